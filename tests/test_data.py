"""Data sets as users have them: odd images and folders, arrays, files that are cut or damaged."""

import gzip
import io
import pickle
import shutil
import struct
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import data
from conftest import start, write_folder

GREEN, MAGENTA, WHITE = (0, 128, 0), (255, 0, 255), (255, 255, 255)


def refuses(name, *words, data_dir="data"):
    """The one line of an error, which has all of the words."""
    with pytest.raises((ValueError, OSError)) as error:
        data.load(name, data_dir)
    line = str(error.value)
    assert "\n" not in line and all(str(word) in line for word in words), line
    return line


def saved(image, path, **how):
    image.save(path, **how)
    return np.asarray(data.read_image(path))


def square(inside, outside):
    pixels = np.full((32, 32, len(outside)), outside, np.uint8)  # of any number of channels
    pixels[8:24, 8:24] = inside
    return pixels


RGBA = Image.fromarray(square((*GREEN, 255), (*MAGENTA, 0)))
PALETTE = Image.fromarray(square((1,), (0,))[..., 0]).convert("P")
PALETTE.putpalette([*MAGENTA, *GREEN])
DEEP = Image.fromarray(257 * square((128,), (9,))[..., 0].astype(np.uint16))
TRANSPARENT = {  # image, how it is saved, colour of the square
    "rgba.png": (RGBA, {}, GREEN),
    "palette.png": (PALETTE, {"transparency": 0}, GREEN),
    "palette_of_alphas.png": (PALETTE, {"transparency": b"\0\xff"}, GREEN),
    "rgb.png": (RGBA.convert("RGB"), {"transparency": MAGENTA}, GREEN),
    "grey.png": (RGBA.convert("L"), {"transparency": 105}, (75, 75, 75)),
    "grey16.png": (DEEP, {"transparency": 9 * 257}, (128, 128, 128)),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_images_are_on_white(tmp_path, name):
    image, how, colour = TRANSPARENT[name]
    assert (saved(image, tmp_path / name, **how) == square(colour, WHITE)).all()


def test_images_of_more_than_8_bits(tmp_path):
    ramp = np.linspace(0, 65535, 1024).reshape(32, 32)
    read = saved(Image.fromarray(ramp.astype(np.uint16)), tmp_path / "a.png")
    assert np.abs(read - ramp[..., None] / 257).max() < 1
    for dtype in (np.float32, np.int32, np.uint16):
        Image.fromarray(ramp.astype(dtype)).save(tmp_path / "a.tif")
        refuses(f"folder:{tmp_path}", "a.tif", "npz:", data_dir=tmp_path / "cache")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_turned_images_are_upright(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image = Image.new("RGB", (40, 20))
    image.paste(WHITE, (0, 0, 20, 20))
    read = saved(image, tmp_path / f"a.{suffix}", exif=exif)
    assert read.shape == (40, 20, 3) and read[:16].min() > 200 and read[24:].max() < 50


def test_exif_of_odd_types(tmp_path):
    tags = [(0x112, 3, 1, b"\6\0\0\0"), (0x100, 2, 4, b"abc")]  # turned; a width that is a text
    packed = b"".join(struct.pack("<HHI4s", *tag) for tag in tags)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + packed + bytes(4)
    read = saved(Image.new("RGB", (40, 20), GREEN), tmp_path / "a.jpg", exif=exif)
    assert read.shape == (40, 20, 3)


def test_an_image_with_a_long_text(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 70_000_000, zip=True)
    assert (saved(Image.new("RGB", (8, 8), GREEN), tmp_path / "a.png", pnginfo=info) == GREEN).all()


def test_a_large_photograph_is_decoded_small(tmp_path):
    Image.new("RGB", (4000, 3000)).save(tmp_path / "a.jpg")
    with mock.patch("data.ImageOps.fit", wraps=data.ImageOps.fit) as fit:
        data.load(f"folder:{tmp_path}", tmp_path / "cache", 64)
    assert fit.call_args.args[0].size == (500, 375)  # by pillow's draft mode


def test_one_class_however_it_comes(tmp_path):
    pets = write_folder(tmp_path / "pets")
    shutil.rmtree(pets / "dogs")
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((9, 8, 8, 1), np.uint8))
    for name in ("folder:pets", "folder:pets/cats", "npz:a.npz"):
        _, labels, names = data.load(name.replace(":", f":{tmp_path}/"), tmp_path)
        assert len(names) == 1 and labels.tolist() == [0] * 9


def test_linked_classes_and_files_left_out(tmp_path, capsys):
    write_folder(tmp_path / "pool")
    root = tmp_path / "linked"
    (root / "3").mkdir(parents=True)
    for name, target in (("2", "cats"), ("10", "dogs"), ("3/more", "dogs"), ("3/a.png", "none")):
        (root / name).symlink_to(tmp_path / "pool" / target)
    (root / "3" / "@eaDir").mkdir()  # with a thumbnail, as a network drive has
    shutil.copy(tmp_path / "pool" / "dogs" / "0.png", root / "3" / "@eaDir")
    for name in ("3/IMG_1.HEIC", "3/no_ending", "3/x.jxl", "3/x.mpg", "beside.png", ".DS_Store"):
        (root / name).write_bytes(b"not an image that pillow knows")
    images, labels, names = data.load(f"folder:{root}", tmp_path, 8)
    assert names == ["10", "2", "3"] and labels.bincount().tolist() == [9, 9, 9]
    assert images[labels == 1][:, 0].min() == 255  # cats are red
    assert f"8 files are left out, such as {root}/.DS_Store" in capsys.readouterr().out


def test_files_that_do_not_open_are_all_listed(tmp_path):
    root = write_folder(tmp_path / "pets")
    for i in range(1, 8):
        (root / "cats" / f"{i}.png").write_bytes((root / "cats" / f"{i}.png").read_bytes()[:60])
    line = refuses(f"folder:{root}", "7 files", "1.png", "3.png", data_dir=tmp_path / "cache")
    [listed] = (tmp_path / "cache").iterdir()  # and no cache, not even half of one
    assert "4.png" not in line and str(listed) in line
    assert all(f"{i}.png" in text for i, text in enumerate(listed.read_text().splitlines(), 1))
    (root / "eels").mkdir()
    refuses(f"folder:{root}", "eels has no images")
    refuses(f"folder:{tmp_path}/none", "no folder", "none")


def test_a_cache_is_used_until_a_file_changes(tmp_path):
    root, cache = write_folder(tmp_path / "pets"), tmp_path / "cache"
    data.load(f"folder:{root}", cache, 8)
    np.lib.format.open_memmap(next(cache.iterdir()), "r+")[:] = 7  # the cache alone is there
    assert data.load(f"folder:{root}", cache, 8)[0].unique().tolist() == [7]
    array = data.load_folder(root, cache, 8)[0]
    assert not array.flags.writeable  # a map that may be written to counts as memory
    Image.new("RGB", (9, 9), GREEN).save(root / "cats" / "0.png")
    assert data.load(f"folder:{root}", cache, 8)[0][0, :, 0, 0].tolist() == [*GREEN]


def test_two_runs_read_one_folder_at_once(tmp_path):
    write_folder(tmp_path / "pets", 150)
    code = f"import data; data.load('folder:{tmp_path}/pets', '{tmp_path}/cache', 8)"
    jobs = [start("-c", code) for _ in range(2)]
    assert [job.wait(100) for job in jobs] == [0, 0]
    assert len([*(tmp_path / "cache").iterdir()]) == 1


def test_arrays(tmp_path, capsys):
    arrays, name = np.random.randint(0, 256, (30, 8, 8, 3), np.uint8), f"npz:{tmp_path}/a.npz"
    np.savez(tmp_path / "a.npz", arr_0=arrays, labels=np.arange(30) % 10 + 1)  # as of MATLAB
    images, labels, names = data.load(name)
    assert (images.permute(0, 2, 3, 1).numpy() == arrays).all()
    assert labels.tolist() == [*range(10)] * 3 and names == [str(i) for i in range(1, 11)]
    small = data.load(name, size=4)[0].float()
    assert small.shape == (30, 3, 4, 4) and abs(small.mean() - arrays.mean()) < 5
    np.savez(tmp_path / "a.npz", arrays, np.arange(30) % 3, extra=3)
    assert data.load(name)[1].tolist() == [0, 1, 2] * 10
    assert "not read: extra" in capsys.readouterr().out
    np.save(tmp_path / "a.npy", arrays)
    assert torch.equal(data.load(f"npz:{tmp_path}/a.npy")[0], images)
    np.savez(tmp_path / "a.npz", arr_0=arrays.transpose(0, 3, 1, 2) / 255)
    assert torch.equal(data.load(name)[0], images / 255)
    assert "no value is below 0" in capsys.readouterr().out


def test_arrays_that_are_no_data_set(tmp_path):
    good, objects = np.zeros((6, 8, 8, 3), np.uint8), np.array([None] * 6)
    rgba, nan = np.zeros((6, 8, 8, 4), np.uint8), np.full((6, 2, 8, 8), np.nan)
    bad = [dict(arr_0=x) for x in (rgba, nan, good[:0], good[0], good[:, 1:], objects)]
    bad += [dict(arr_0=good, labels=x) for x in (np.zeros(6), np.arange(5), np.eye(6), objects)]
    for arrays in bad:
        np.savez(tmp_path / "a.npz", **arrays)
        refuses(f"npz:{tmp_path}/a.npz", "a.npz")
    np.savez(tmp_path / "a.npz", x_train=good, y_train=np.zeros(6, int))
    refuses(f"npz:{tmp_path}/a.npz", "x_train, y_train", "arr_0")
    np.save(tmp_path / "labels.npy", np.zeros(6, int))
    for latents, why in ((nan, "image 0 has NaN"), (rgba.astype(float), "not square")):
        np.save(tmp_path / "latents.npy", latents)
        refuses(f"latents:{tmp_path}", why)
    refuses("folder:", "no data set folder:")
    (tmp_path / "a.npz").write_text("hello")
    refuses(f"npz:{tmp_path}/a.npz", "a.npz")
    refuses(f"npz:{tmp_path}/none.npz", "none.npz")


@pytest.mark.parametrize("answer", [io.BytesIO(b"<html>Log in</html>"), OSError("none")])
def test_downloads_that_are_cut_or_a_login_page(monkeypatch, tmp_path, answer):
    monkeypatch.setattr("urllib.request.urlopen", mock.Mock(side_effect=[answer, answer]))
    refuses("mnist", data.MNIST, tmp_path / "MNIST" / "raw", "by hand", data_dir=tmp_path)
    refuses("cifar10", data.CIFAR10, tmp_path / "cifar-10", "by hand", data_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_mnist(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = np.random.randint(0, 256, (20, 28, 28), np.uint8), [*range(10)] * 2
    start = struct.pack(">HBB3i", 0, 8, 3, *images.shape)
    (raw / "train-images-idx3-ubyte").write_bytes(start + images.tobytes())
    packed = raw / "train-labels-idx1-ubyte.gz"
    packed.write_bytes(gzip.compress(struct.pack(">HBBi", 0, 8, 1, 20) + bytes(labels)))
    loaded = data.load("mnist", tmp_path)
    assert (loaded[0][:, 0].numpy() == images).all() and loaded[1].tolist() == labels
    packed.write_bytes(packed.read_bytes()[:30])
    refuses("mnist", packed, "delete it", data_dir=tmp_path)


def test_cifar10(monkeypatch, tmp_path):
    folder = tmp_path / "source" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i in range(1, 6):
        batch = {b"data": np.full((2, 3072), i, np.uint8), b"labels": [i, 0]}
        (folder / f"data_batch_{i}").write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"ape", b"bee"] * 3}))
    archive = Path(shutil.make_archive(tmp_path / "a", "gztar", folder.parent)).read_bytes()
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(archive))
    images, labels, names = data.load("cifar10", tmp_path)
    assert images[:, 2, 31, 31].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert labels.tolist() == [1, 0, 2, 0, 3, 0, 4, 0, 5, 0] and names[5] == "bee"
    batch = tmp_path / folder.name / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:999])
    refuses("cifar10", batch.parent, "delete it", data_dir=tmp_path)


def test_the_sampler_draws_by_label():
    images = torch.arange(64, dtype=torch.uint8).view(-1, 1, 1, 1)  # each has its number
    sampler, asked = data.Sampler(images, torch.arange(64) % 4, "cpu"), torch.tensor([3, 0, 2])
    index, chance = sampler.draw(asked, 16, 50, torch.Generator().manual_seed(0))
    assert torch.equal(index[:, :16].sort().values, 4 * torch.arange(16) + asked[:, None])
    assert len(index[:, 16:].unique()) > 40 and chance.shape == index.shape == (3, 66)
    assert torch.equal(data.to_uint8(sampler.fetch(index, chance)).flatten(), index.flatten())


def test_images_of_a_small_class_are_drawn_again_and_again():
    labels = torch.tensor([0] * 20 + [1] * 3 + [2])
    sampler = data.Sampler(torch.zeros(24, 1, 1, 1), labels, "cpu")
    for n in (7, 30):  # fewer and more than the largest class has
        index, _ = sampler.draw(torch.tensor([0, 1, 2, 1]), n, 0, torch.Generator().manual_seed(n))
        assert torch.equal(labels[index], torch.tensor([0, 1, 2, 1])[:, None].expand(-1, n))
        for row, count in zip(index, (20, 3, 1, 3), strict=True):
            times = row.unique(return_counts=True)[1]
            assert len(times) == min(n, count) and times.max() - times.min() <= 1


def test_no_class_comes_twice_before_each_came_once():
    sampler = data.Sampler(torch.zeros(10, 1, 1, 1), torch.arange(10), "cpu")
    label = sampler.draw_labels(25, torch.Generator())
    assert label[:10].unique().numel() == label[10:20].unique().numel() == 10 and len(label) == 25


def test_half_of_the_images_are_mirrored():
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(200, 1, 1, 2)
    views, every = torch.stack([images, images.flip(-1)], dim=1), torch.arange(200)
    for which, flip, left in ((images, False, -1), (images, True, 0), (views, True, 0)):
        sampler = data.Sampler(which, torch.zeros(200).long(), "cpu", flip)
        drawn = sampler.fetch(every, torch.rand(200))
        assert abs(drawn[..., 0].mean() - left) < 0.2 and (drawn.sum(-1) == 0).all()
        assert sampler.fetch(every, torch.zeros(200))[..., 0].unique() == -1  # as they are
