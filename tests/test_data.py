"""Data sets on disk, downloaded and unpacked; folders of odd images; the sampler."""

import hashlib
import io
import os
import pickle
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
import fid
from conftest import ASSETS, fails, needs, write_cifar, write_folder, write_idx


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


def test_folder_without_classes(monkeypatch, tmp_path, capsys):
    root = tmp_path / "pets"
    (root / "notes").mkdir(parents=True)
    for i, color in enumerate(((255, 0, 0), (0, 0, 255))):
        Image.new("RGB", (40, 30), color).save(root / f"{i}.png")
    images, labels, names = data.load(f"folder:{root}", tmp_path / "cache", 8)
    assert images.float().mean((2, 3)).tolist() == [[255, 0, 0], [0, 0, 255]]
    assert labels.tolist() == [0, 0] and names == ["pets"]
    Image.new("RGB", (9, 9)).save(root / "notes" / "new.png")
    command = ["train.py", "--dataset", f"folder:{root}", "--data_dir", tmp_path / "cache"]
    line = fails(monkeypatch, capsys, *command, "--out", tmp_path / "a.pt")
    assert "has images and classes, such as notes: move either" in line


# Arrays


def test_npz_of_images(tmp_path):
    images = np.random.randint(0, 256, (30, 8, 8, 3), np.uint8)
    labels, name = np.arange(30) % 3, f"npz:{tmp_path}/a.npz"
    np.savez(tmp_path / "a.npz", arr_0=images, labels=labels)
    loaded, loaded_labels, names = data.load(name)
    assert loaded.dtype == torch.uint8 and names == ["0", "1", "2"]
    assert (loaded.permute(0, 2, 3, 1).numpy() == images).all()
    assert loaded_labels.tolist() == labels.tolist()
    assert data.load(name, size=4)[0].shape == (30, 3, 4, 4)
    np.savez(tmp_path / "a.npz", arr_0=images)
    _, loaded_labels, names = data.load(name)
    assert names == ["0"] and loaded_labels.tolist() == [0] * 30


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npz_of_floats_is_taken_as_it_is(tmp_path, dtype):
    floats = (3 * np.random.randn(30, 5, 4, 4)).astype(dtype)
    np.savez(tmp_path / "a.npz", arr_0=floats)
    images, labels, _ = data.load(f"npz:{tmp_path}/a.npz")
    assert torch.equal(images, torch.from_numpy(floats).float()) and images.abs().max() > 5
    sampler = data.Sampler(images, labels, "cpu")
    drawn, _ = sampler.draw(torch.tensor([0]), 30, 0, torch.Generator().manual_seed(0))
    order = drawn[0].flatten(1)[:, 0].argsort()
    assert torch.equal(drawn[0][order], images[images[:, 0, 0, 0].argsort()])
    with pytest.raises(ValueError, match="not resized to 8"):
        data.load(f"npz:{tmp_path}/a.npz", size=8)


def test_npz_that_is_no_data_set_is_one_line(monkeypatch, tmp_path, capsys):
    out, file = tmp_path / "keep.pt", tmp_path / "a.npz"
    out.write_text("precious")

    def bad(images=None, **arrays):
        if images is not None or arrays:
            np.savez(file, **arrays | ({} if images is None else {"arr_0": images}))
        line = fails(monkeypatch, capsys, "train.py", "--dataset", f"npz:{file}", "--out", out)
        assert f"'{file}' is no data set" in line or "square ones" in line
        assert out.read_text() == "precious"
        return line

    assert "No such file" in bad()
    images, floats = np.zeros((6, 8, 8, 3), np.uint8), np.zeros((6, 2, 8, 8), np.float32)
    assert "labels are int64 (5,) for 6 images" in bad(images, labels=np.zeros(5, int))
    assert "labels are int64 (6, 1)" in bad(images, labels=np.zeros((6, 1), int))
    assert "labels are float64" in bad(images, labels=np.zeros(6))
    assert "labels are" in bad(images, labels=np.full(6, -1))
    assert "a label is 6, more than there are images" in bad(images, labels=np.full(6, 6))
    for number in (np.nan, np.inf, 101):
        floats[3, 1, 4, 4] = number
        assert f"floats up to {number}: scale them to about 1" in bad(floats)
    assert "floats up to 1e+300" in bad(np.full((6, 2, 8, 8), 1e300))
    assert "allow_pickle" in bad(np.array([[None]]))
    assert "allow_pickle" in bad(images, labels=np.array(["a"] * 6, object))
    assert "arr_0 is int64 (6, 8, 8, 3)" in bad(images.astype(int))
    assert "arr_0 is complex64" in bad(floats.astype(np.complex64))
    assert "arr_0 is uint8 (6, 8, 8)" in bad(images[..., 0])
    assert "arr_0 is uint8 (0, 8, 8, 3)" in bad(images[:0])
    assert "images of 4 x 8" in bad(images[:, :, :4])
    assert "arr_0" in bad(other=images)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"hello"):
        file.write_bytes(damaged)
        bad()
    np.save(tmp_path / "a.npy", images)
    (tmp_path / "a.npy").rename(file)
    bad()


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


# Bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_is_for_a_terminal(monkeypatch, tmp_path, capsys):
    needs("tqdm")
    name = f"folder:{write_folder(tmp_path / 'pets')}"

    def shown(folder):
        monkeypatch.setattr(sys, "stderr", Terminal())
        assert len(data.load(name, folder, 8)[0]) == 18
        return sys.stderr.getvalue()

    assert "pets: 100%" in shown(tmp_path / "one")
    data.say("a line")
    assert "a line\n" in capsys.readouterr().out  # not into the bar
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert shown(tmp_path / "two") == f"{tmp_path}/pets: pip install tqdm shows how far it is\n"
    monkeypatch.undo()
    data.load(name, tmp_path / "three", 8)
    assert capsys.readouterr().err == ""
