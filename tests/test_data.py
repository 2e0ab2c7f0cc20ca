"""Data sets on disk, downloaded and unpacked; folders of odd images; the sampler."""

import hashlib
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
import fid
from conftest import ASSETS, fails, write_cifar, write_folder, write_idx


def test_digits():
    images, labels, names = data.load("digits")
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8 and images.max() == 255
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert names == [str(i) for i in range(10)]
    assert torch.equal(data.to_uint8(data.to_float(images)), images)
    floats = torch.tensor([-3.0, -1.0, 0.0, 1.0, 1.1])
    assert data.to_uint8(floats).tolist() == [0, 0, 128, 255, 255]
    assert data.load("digits", size=16)[0].shape == (1797, 1, 16, 16)


# The sampler, beyond test_drift.py


def test_sampler_mirrors_half():
    images = torch.tensor([[0, 255]], dtype=torch.uint8).view(1, 1, 1, 2).repeat(100, 1, 1, 1)
    labels = torch.zeros(100).long()
    for flip in (False, True):
        sampler, g = data.Sampler(images, labels, "cpu", flip), torch.Generator().manual_seed(0)
        for drawn in (sampler.draw(torch.tensor([0]), 100, 0, g)[0], sampler.batch(100, g)[0]):
            left = drawn[..., 0]
            assert abs(left.mean()) < 0.3 if flip else (left == -1).all()


def test_sampler_batch_has_its_labels():
    images = torch.arange(64, dtype=torch.uint8).view(-1, 1, 1, 1)  # every image says its index
    labels = torch.randint(5, (64,))
    sampler, g = data.Sampler(images, labels, "cpu"), torch.Generator().manual_seed(0)
    drawn, drawn_labels = sampler.batch(300, g)
    index = data.to_uint8(drawn).flatten().long()
    assert torch.equal(labels[index], drawn_labels) and len(index.unique()) > 50
    g.manual_seed(0)
    share, share_labels = sampler.batch(300, g, slice(100, 200))
    assert torch.equal(share, drawn[100:200]) and torch.equal(share_labels, drawn_labels[100:200])


# Files of data sets


@pytest.mark.parametrize(
    "name, folder, packed", [("mnist", "MNIST", False), ("fashion", "FashionMNIST", True)]
)
def test_idx_files(tmp_path, name, folder, packed):
    images = np.random.randint(0, 256, (30, 28, 28), np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 10
    raw = tmp_path / folder / "raw"
    write_idx(raw, images, labels, packed)
    loaded, loaded_labels, names = data.load(name, tmp_path)
    assert (loaded[:, 0].numpy() == images).all() and (loaded_labels.numpy() == labels).all()
    assert len(names) == 10
    write_idx(raw, 255 - images, labels, packed, "t10k")
    test = data.load(name, tmp_path, split="test")[0]
    assert (test[:, 0].numpy() == 255 - images).all()


def test_idx_files_are_downloaded_and_checked(monkeypatch, tmp_path):
    source, packed = tmp_path / "source", "train-images-idx3-ubyte.gz"
    write_idx(source, np.zeros((5, 28, 28), np.uint8), np.zeros(5, np.uint8), True)
    monkeypatch.setattr(data, "MNIST", ("MNIST", f"{source.as_uri()}/"))
    with pytest.raises(ValueError, match="MD5"):
        data.load("mnist", tmp_path / "data")
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    for path in source.iterdir():
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(data.MD5, ("MNIST", path.name), md5)
    assert len(data.load("mnist", tmp_path / "data")[0]) == 5
    (source / packed).unlink()
    assert len(data.load("mnist", tmp_path / "data")[0]) == 5  # it is here now
    (tmp_path / "data" / "MNIST" / "raw" / packed).unlink()
    with pytest.raises(OSError, match=r"cannot download .*put the file at"):
        data.load("mnist", tmp_path / "data")


def test_cifar10_downloads_checks_and_unpacks(monkeypatch, tmp_path):
    folder, archive = tmp_path / "source" / "cifar-10-batches-py", tmp_path / "cifar.tar.gz"
    write_cifar(folder)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(data, "CIFAR10", archive.as_uri())
    with pytest.raises(ValueError, match="MD5"):
        data.load("cifar10", tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())  # nothing half done under any name
    monkeypatch.setitem(data.MD5, "cifar10", hashlib.md5(archive.read_bytes()).hexdigest())
    images, labels, names = data.load("cifar10", tmp_path / "data")
    assert images.shape == (100, 3, 32, 32) and images[99, 0, 0, 0] == 5
    assert labels[13] == 3 and names[3] == "class 3"
    assert data.load("cifar10", tmp_path / "data", split="test")[0].unique().tolist() == [0]
    with pytest.raises(ValueError, match="no test split"):
        data.load("digits", split="test")
    kept = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert kept == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]


def test_malicious_pickle_is_refused(monkeypatch, capsys, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    write_cifar(tmp_path / "cifar-10-batches-py")
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(pickle.dumps(Evil()))
    command = ["train.py", "--dataset", "cifar10", "--data_dir", tmp_path]
    line = fails(monkeypatch, capsys, *command, "--out", tmp_path / "a.pt")
    assert "data_batch_3" in line and "wants to call" in line
    assert not (tmp_path / "ran").exists()


def test_archives_stay_in_their_folder(monkeypatch, tmp_path):
    """Members named ../, absolute ones, links that lead out: refused for their MD5, and if that
    were right, too."""
    folder = tmp_path / "data"
    archive, inside = folder / "cifar-10-python.tar.gz", folder / "cifar-10-batches-py"
    folder.mkdir()
    (tmp_path / "file").write_text("evil")
    for name in ("../outside", str(tmp_path / "outside"), "cifar-10-batches-py/link", "link"):
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(ASSETS, inside.name, recursive=False)
            member = tar.gettarinfo(tmp_path / "file", name)
            member.name = name
            if "link" in name:
                member.type, member.linkname = tarfile.SYMTYPE, "../../outside"
                tar.addfile(member)
            else:
                with open(tmp_path / "file", "rb") as file:
                    tar.addfile(member, file)
        with pytest.raises(ValueError, match="MD5"):
            data.load("cifar10", folder)
        with monkeypatch.context() as patch:
            patch.setitem(data.MD5, "cifar10", hashlib.md5(archive.read_bytes()).hexdigest())
            with pytest.raises(ValueError):
                data.load("cifar10", folder)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file"]
        shutil.rmtree(inside, ignore_errors=True)


def test_damaged_data_sets_are_one_line(monkeypatch, tmp_path, capsys):
    def bad(dataset, *args):
        command = ["train.py", "--dataset", dataset, "--data_dir", tmp_path / "data", *args]
        return fails(monkeypatch, capsys, *command, "--out", tmp_path / "a.pt")

    pets = f"folder:{tmp_path}/pets"
    assert "there is no folder" in bad(f"folder:{tmp_path}/none")
    (tmp_path / "empty" / "cats").mkdir(parents=True)
    assert "no images" in bad(f"folder:{tmp_path}/empty")
    write_folder(tmp_path / "pets")
    (tmp_path / "pets" / "eels").mkdir()
    assert "eels has no images" in bad(pets)
    (tmp_path / "pets" / "eels").rmdir()
    assert "lower --n_pos" in bad(pets, "--n_pos", 10)
    whole = (tmp_path / "pets" / "cats" / "0.png").read_bytes()
    (tmp_path / "pets" / "cats" / "broken.png").write_bytes(whole[:60])
    assert "broken.png" in bad(pets)
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(b"not the archive")
    assert "MD5" in bad("cifar10")
    raw = tmp_path / "data" / "MNIST" / "raw"
    write_idx(raw, np.zeros((5, 28, 28), np.uint8), np.zeros(5, np.uint8), False)
    cut = raw / "train-images-idx3-ubyte"
    cut.write_bytes(cut.read_bytes()[:1000])
    assert "train-images-idx3-ubyte" in bad("mnist")
    assert not (tmp_path / "a.pt").exists()


# Folders of images


def test_folder(tmp_path):
    root, cache = write_folder(tmp_path / "pets"), tmp_path / "cache"
    images, labels, names = data.load(f"folder:{root}", cache, 16)
    assert images.shape == (18, 3, 16, 16)
    assert names == ["cats", "dogs"] and labels.tolist() == [0] * 9 + [1] * 9
    assert images[0].flatten(1).float().mean(1).tolist() == [255, 0, 0]
    [cached] = cache.iterdir()
    before = cached.stat().st_mtime_ns
    data.load(f"folder:{root}", cache, 16)
    assert cached.stat().st_mtime_ns == before  # read once
    Image.new("RGB", (9, 9)).save(root / "dogs" / "new.png")
    assert len(data.load(f"folder:{root}", cache, 16)[0]) == 19  # a new file is seen


def write_odd_images(root):
    """Pictures of red in every mode, one that is turned, and much that is no image; names."""
    root.mkdir(parents=True)
    red, half = Image.new("RGB", (12, 8), (255, 0, 0)), Image.new("RGB", (12, 8))
    half.paste((255, 255, 255), (0, 0, 6, 8))  # left half white: turned, the upper
    odd = {
        "1x1.png": red.resize((1, 1)),
        "palette.png": red.quantize(4),
        "alpha.png": red.convert("RGBA"),
        "cmyk.jpg": red.convert("CMYK"),
        "wide.png": red.resize((20000, 3)),
        "black and white.png": red.convert("1"),
        "16bit.png": Image.fromarray(np.full((8, 12), 51400, np.uint16)),
    }
    for name, image in odd.items():
        image.save(root / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    half.save(root / "turned.jpg", exif=exif, quality=100)
    red.save(root / "moving.gif", save_all=True, append_images=[half])
    (root / ".hidden").mkdir()
    for hidden in (".hidden/a.png", ".thumb.png", "notes.txt", "a.pdf"):
        (root / hidden).write_text("no image")
    (root / "folder.png").mkdir()
    (root / "loop").symlink_to(root)
    (root / "loop.png").symlink_to(root / "loop.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "pipe.png")  # to open it would wait for ever
    return sorted([*odd, "turned.jpg", "moving.gif"])


def test_odd_images_and_folders(monkeypatch, tmp_path, capsys):
    root, cache = tmp_path / "my pictures" / "class one", tmp_path / "cache"
    written = write_odd_images(root)
    images, _, names = data.load(f"folder:{root.parent}", cache, 8)
    assert len(images) == len(written) and names == ["class one"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "my pictures"]
    by_name = dict(zip(written, images, strict=True))
    assert (by_name["16bit.png"] == 200).all()  # 51400 / 257
    assert by_name["turned.jpg"][:, :3].min() > 200 and by_name["turned.jpg"][:, 5:].max() < 50
    for name in ("1x1.png", "palette.png", "alpha.png", "wide.png", "moving.gif"):
        assert (by_name[name][0] > 250).all() and (by_name[name][1] < 5).all(), name

    def bad():
        command = ["train.py", "--dataset", f"folder:{root.parent}", "--data_dir", cache]
        return fails(monkeypatch, capsys, *command, "--out", tmp_path / "a.pt")

    (root / "empty.png").write_bytes(b"")
    assert "'empty.png'" in bad().replace(f"{root}/", "")
    Image.new("L", (10, 10)).save(root / "script.eps")  # PostScript is a program
    (root / "empty.png").write_bytes((root / "script.eps").read_bytes())
    line = bad()
    assert "empty.png" in line and "script.eps" not in line
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # 96 pixels are above it, but not twice
    line = bad()
    assert "decompression bomb" in line and "and 6 others" in line
    assert not list(cache.glob("*.tmp"))
    (root.parent / "class two").mkdir()
    assert "class two has no images" in bad()
    with pytest.raises(ValueError, match="decompression bomb"):
        fid.load_set(str(root), tmp_path)


# Files that are written


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), data.whole(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with data.whole(path) as file:
        file.write(b"new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_grid_puts_images_row_by_row(tmp_path):
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 28, 28) * 40 + 40
    data.save_grid(images, tmp_path / "a.png", columns=2)
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    assert grid.shape == (3 * 60, 2 * 60)  # 28 pixels and a margin, twice as large
    middles = grid[30::60, 30::60]
    assert middles.tolist() == [[40, 80], [120, 160], [200, 0]]
