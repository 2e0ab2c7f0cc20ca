"""A data set as latents: views of images, the folder of them, kills, full disks, several ranks."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import latents
from conftest import fails, needs, python, run, torchrun, write_idx

FILES = ("latents.npy", "labels.npy", "classes.json")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(latents, "BLOCK", 4)


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """An autoencoder of random weights, 3 x 16 x 16 to 4 x 8 x 8, in a folder."""
    needs("diffusers")
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    net = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    net.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pets(tmp_path):
    """18 pictures of noise, of odd sizes, in two classes."""
    rng = np.random.default_rng(0)
    for name, n in (("cats", 7), ("dogs", 11)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(n):
            noise = rng.integers(0, 256, (20 + 7 * i, 61 - 3 * i, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "pets" / name / f"{i:02d}.png")
    return tmp_path / "pets"


def encode(folder, out, *args):
    plan = ["encode", "--dataset", f"folder:{folder}", "--size", 16, "--device", "cpu"]
    latents.main([str(a) for a in (*plan, "--out", out, *args)])
    return out


def content(out):
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    return [(out / name).read_bytes() for name in FILES]


def noise_of(seed, block, n):
    seed = int(np.random.SeedSequence((seed, block)).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(4, 8, 8, generator=generator) for _ in range(n)])


# Views


def box(x, n):
    """The mean of what is nearest, along the first axis."""
    scale, where = len(x) / n, np.arange(len(x)) + 0.5
    away = [(where - (i + 0.5) * scale) / scale for i in range(n)]
    return np.stack([np.floor(x[(a > -0.5) & (a <= 0.5)].mean(0) + 0.5) for a in away])


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_centre_crop_is_that_of_adm(mode):
    rng = np.random.default_rng(0)
    sizes = [(16, 16), (31, 40), (32, 32), (33, 130), (100, 17), (7, 9), (64, 65), (150, 131)]
    for width, height in sizes:
        small = rng.integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), np.uint8)
        image = Image.fromarray(small).resize((width, height)).convert(mode)
        found = np.asarray(latents.centre_crop(image, 16), np.float64)
        x = np.asarray(image, np.float64).reshape(height, width, -1)
        while min(x.shape[:2]) >= 32:
            x = box(x, len(x) // 2)
            x = box(x.transpose(1, 0, 2), x.shape[1] // 2).transpose(1, 0, 2)
        shape = [round(side * 16 / min(x.shape[:2])) for side in x.shape[:2]]
        x = torch.from_numpy(x.copy()).permute(2, 0, 1)[None]
        # As pillow does it: to the width, to 8 bits, then to the height
        x = F.interpolate(x, (x.shape[2], shape[1]), mode="bicubic", antialias=True)
        x = x.clamp(0, 255).round()
        x = F.interpolate(x, shape, mode="bicubic", antialias=True)[0].clamp(0, 255)
        top, left = (shape[0] - 16) // 2, (shape[1] - 16) // 2
        x = x[:, top : top + 16, left : left + 16].permute(1, 2, 0).numpy()
        assert found.size == x.size
        assert np.abs(found.reshape(x.shape) - x).max() < 1.1, (width, height)


def test_random_crops():
    """Of an image that says where a pixel is: how much they show, of what shape, how mirrored."""
    x, y = np.meshgrid(np.arange(240), np.arange(200))
    image = Image.fromarray(np.stack([x, y, 255 + 0 * x], -1).astype(np.uint8))
    shown = []
    for i in range(300):
        crop = latents.random_crop(image, 16, np.random.default_rng((5, i)))
        crop = np.asarray(crop, np.float64)
        assert crop.shape == (16, 16, 3) and (crop[..., 2] == 255).all()  # no border
        shown.append([crop[8, 12, 0] - crop[8, 3, 0], crop[12, 8, 1] - crop[3, 8, 1]])
        shown[-1] += [crop[8, 7:9, 0].mean(), crop[7:9, 8, 1].mean()]
    width, height, left, top = np.array(shown).T
    mirrored = width < 0
    width, height = np.abs(width) * 16 / 9, height * 16 / 9
    area, aspect = width * height / 240 / 200, width / height
    assert 0.17 < area.min() < 0.25 and 0.9 < area.max() < 1.06
    assert 0.4 < area.mean() < 0.6
    assert 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.4
    assert 0.4 < mirrored.mean() < 0.6
    assert np.ptp(left) > 80 and np.ptp(top) > 60
    wide = image.resize((200, 8))  # no try fits
    crop = np.asarray(latents.random_crop(wide, 16, np.random.default_rng(0)))
    centre = np.asarray(latents.centre_crop(wide, 16))
    assert (crop == centre).all() or (crop == centre[:, ::-1]).all()


def test_pixels_of_a_folder(pets, tmp_path):
    encode(pets, tmp_path / "a", "--crops", 3)
    images, labels, names, info = latents.load(tmp_path / "a")
    assert images.shape == (18, 5, 3, 16, 16) and images.dtype == torch.uint8
    assert labels.tolist() == [0] * 7 + [1] * 11 and names == ["cats", "dogs"]
    expected = dict(dataset=f"folder:{pets}", size=16, crops=3, seed=0, images=18, vae=None)
    expected |= dict(factor=None, shift=None, classes=names)
    assert expected.items() <= info.items()
    for image, file in zip(images, sorted(pets.rglob("*.png")), strict=True):
        centre = np.asarray(latents.centre_crop(Image.open(file), 16))
        assert (image[0].permute(1, 2, 0).numpy() == centre).all()
        assert torch.equal(image[1], image[0].flip(-1))
        assert len(image.flatten(1).unique(dim=0)) >= 4
    content(encode(pets, tmp_path / "b", "--crops", 3, "--seed", 1))
    others = latents.load(tmp_path / "b")[0]
    assert torch.equal(others[:, :2], images[:, :2]) and not torch.equal(others, images)
    loaded, loaded_labels, _ = data.load(f"latents:{tmp_path / 'a'}", size=16)
    assert torch.equal(loaded, images) and torch.equal(loaded_labels, labels)


def test_grey_arrays(tmp_path, vae):
    digits = np.random.default_rng(0).integers(0, 256, (10, 28, 28), np.uint8)
    write_idx(tmp_path / "MNIST" / "raw", digits, np.arange(10, dtype=np.uint8), False)
    plan = ["encode", "--dataset", "mnist", "--data_dir", str(tmp_path), "--size", "16"]
    latents.main([*plan, "--device", "cpu", "--out", str(tmp_path / "a")])
    images, labels, names, _ = latents.load(tmp_path / "a")
    assert images.shape == (10, 2, 1, 16, 16) and labels.tolist() == list(range(10))
    centre = np.asarray(latents.centre_crop(Image.fromarray(digits[3]), 16))
    assert (images[3, 0, 0].numpy() == centre).all() and len(names) == 10
    latents.main([*plan, "--device", "cpu", "--out", str(tmp_path / "b"), "--vae", vae])
    assert latents.load(tmp_path / "b")[0].shape == (10, 2, 4, 8, 8)


# The autoencoder


@torch.no_grad()
def test_latents_are_samples(pets, tmp_path, vae):
    """Of an image and of its mirror image: mean + std * noise, shifted and scaled."""
    encode(pets, tmp_path / "pixels")
    encode(pets, tmp_path / "a", "--vae", vae, "--seed", 7)
    encode(pets, tmp_path / "b", "--vae", vae, "--seed", 7, "--batch", 6)
    found, labels, _, info = latents.load(tmp_path / "a")
    assert found.shape == (18, 2, 4, 8, 8) and found.dtype == torch.float16
    assert info["vae"] == vae and (info["factor"], info["shift"]) == (0.5, 0.25)
    # The numbers are those of an image, whatever goes through at once
    torch.testing.assert_close(latents.load(tmp_path / "b")[0], found, atol=2e-3, rtol=2e-3)

    net = latents.load_vae(vae, "cpu", channels=4)
    pixels = data.to_float(latents.load(tmp_path / "pixels")[0])
    for block in (0, 4):
        images = pixels[block * 4 : block * 4 + 4]
        spread = net.encode(torch.stack([images[:, 0], images[:, 0].flip(-1)], 1).flatten(0, 1))
        mean, std = spread.latent_dist.mean, spread.latent_dist.std
        noise = noise_of(7, block, 2 * len(images))
        z = ((mean + std * noise - 0.25) * 0.5).unflatten(0, (-1, 2))
        assert std.mean() > 0.1 and len(z) == len(images) > 1
        torch.testing.assert_close(
            found[block * 4 : block * 4 + 4].float(), z, atol=2e-3, rtol=2e-3
        )
    assert torch.equal(labels, latents.load(tmp_path / "pixels")[1])

    mean = net.encode(pixels[:, 0]).latent_dist.mean
    decoded = latents.decode(net, (mean - 0.25) * 0.5)
    torch.testing.assert_close(decoded, net.decode(mean).sample, atol=1e-5, rtol=1e-4)
    assert decoded.shape == (18, 3, 16, 16) and decoded.std() > 0.02


def test_no_autoencoder_is_one_line(monkeypatch, pets, tmp_path, capsys, vae):
    from diffusers import AutoencoderTiny

    def bad(vae, size=16):
        more = ["--vae", vae, "--size", size, "--out", tmp_path / "a", "--device", "cpu"]
        plan = ["encode", "--dataset", f"folder:{pets}", *more]
        return fails(monkeypatch, capsys, "data.py", *plan)

    assert "does not load" in bad(tmp_path / "none")
    channels = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8))
    blocks = dict(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    AutoencoderTiny(**channels, **blocks).save_pretrained(tmp_path / "tiny")
    assert "cannot encode images of 16 pixels" in bad(tmp_path / "tiny")  # it has no deviation
    with pytest.raises(ValueError, match=r"decodes 4 channels, the generator gives 16"):
        latents.load_vae(vae, "cpu", 16)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "--vae needs pip install diffusers" in bad(vae)
    assert not (tmp_path / "a").exists()


# Ranks, kills, full disks

STUB = """
from types import SimpleNamespace
import data, latents
class Autoencoder:
    config = SimpleNamespace(scaling_factor=0.5)
    def encode(self, images):
        mean = images.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=mean.abs() + 1))
latents.BLOCK, latents.load_vae = 4, lambda name, device: Autoencoder()
data.run(latents.main)
"""


def test_two_ranks_write_the_same(monkeypatch, pets, tmp_path):
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    plan = ["encode", "--dataset", f"folder:{pets}", "--size", 16, "--vae", "stub", "--crops", 1]
    plan += ["--device", "cpu", "--out"]
    status, out, err = python(*torchrun(2), script, *plan, tmp_path / "a")
    assert status == 0, err
    assert out.count("takes 0.0 GB") == out.count("18 images, 3 views of 3 x 8 x 8 each") == 1
    monkeypatch.setattr(latents, "load_vae", None)  # so that it comes back
    run(monkeypatch, script, *plan, tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


# Ends in the middle of the third block, when its bytes are written but not marked
KILLED = """
import os, signal, sys
import latents
latents.BLOCK, latents.os.synced, fsync = 4, 0, os.fsync
def killing(number):
    latents.os.synced += "latents.npy" in os.readlink(f"/proc/self/fd/{number}")
    if latents.os.synced > 3:  # once for the file as a whole
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(number)
os.fsync = killing
latents.main()
"""

FULL = """
import resource
import data, latents
latents.BLOCK, encode_block = 4, latents.encode_block
def full(block, *args):
    room = 15000 if block == 2 else resource.RLIM_INFINITY  # of 28 KB
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    return encode_block(block, *args)
latents.encode_block = full
data.run(latents.main)
"""


@pytest.fixture
def redone(monkeypatch):
    """The blocks that were encoded."""
    numbers, encode_block = [], latents.encode_block

    def counted(block, *args):
        numbers.append(block)
        return encode_block(block, *args)

    monkeypatch.setattr(latents, "encode_block", counted)
    return numbers


@pytest.mark.parametrize("script", [KILLED, FULL])
def test_what_is_there_stays(pets, tmp_path, redone, script):
    pytest.importorskip("resource")
    out = tmp_path / "a"
    plan = ["encode", "--dataset", f"folder:{pets}", "--size", 16, "--device", "cpu"]
    status, _, err = python("-c", script, *plan, "--out", out)
    if script == FULL:
        assert status == 2 and err.count("\n") == 1 and "File too large" in err
        assert f"cannot write {out}" in err and "the same command goes on" in err
    else:
        assert status == -9 and not err
    assert sorted(path.name for path in (out / "blocks").iterdir()) == ["0", "1"]
    with pytest.raises(ValueError, match="is not whole"):
        latents.load(out)
    before = (out / "latents.npy").read_bytes()
    encode(pets, out)
    assert redone == [2, 3, 4]
    encode(pets, tmp_path / "b")
    whole = content(tmp_path / "b")
    assert content(out) == whole and before[:6000] == whole[0][:6000] and before != whole[0]
    redone.clear()
    encode(pets, out)  # there is nothing left to do
    assert not redone and content(out) == whole


def test_only_the_missing_block_is_encoded(pets, tmp_path, redone, capsys):
    out = encode(pets, tmp_path / "a")
    whole = content(out)
    (out / "blocks").mkdir()
    for block in (0, 1, 2, 4):
        (out / "blocks" / str(block)).touch()
    images = np.load(out / "latents.npy", mmap_mode="r+")
    images[12:16] = 0
    images.flush()
    assert content_differs(out, whole)
    redone.clear()
    capsys.readouterr()
    encode(pets, out)
    assert redone == [3] and content(out) == whole
    assert "takes 0.0 GB more" in capsys.readouterr().out


def content_differs(out, whole):
    return [(out / name).read_bytes() for name in FILES] != whole


def test_too_little_room(monkeypatch, pets, tmp_path, redone, capsys):
    free = SimpleNamespace(free=27647)  # a byte too little
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(ValueError, match=r"a takes 0\.0 GB, 0\.0 GB are free"):
        encode(pets, tmp_path / "a")
    assert not redone and not list(tmp_path.rglob("*.npy"))
    free.free += 1
    encode(pets, tmp_path / "a")
    assert "a takes 0.0 GB, 0.0 GB are free" in capsys.readouterr().out
    assert len(redone) == 5


def test_a_broken_image(monkeypatch, pets, tmp_path, redone, capsys):
    """It is named when all others are encoded; with another in its place the rest is done."""
    out, broken = tmp_path / "a", pets / "cats" / "05.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    plan = ["encode", "--dataset", f"folder:{pets}", "--size", 16, "--device", "cpu"]
    line = fails(monkeypatch, capsys, "data.py", *plan, "--out", out)
    assert "do not open as images" in line and "05.png" in line and "others" not in line
    assert redone == [0, 1, 2, 3, 4] and len(list((out / "blocks").iterdir())) == 4
    broken.write_bytes(whole)
    encode(pets, out)
    assert redone[5:] == [1]
    assert content(out) == content(encode(pets, tmp_path / "b"))


# Another plan, damaged folders


def test_another_plan_is_refused(monkeypatch, pets, tmp_path, capsys):
    out = encode(pets, tmp_path / "a")
    whole = content(out)
    shutil.copytree(pets, tmp_path / "others")

    def bad(*args, out=out):
        plan = ["encode", "--dataset", f"folder:{pets}", "--size", 16, "--device", "cpu"]
        return fails(monkeypatch, capsys, "data.py", *plan, "--out", out, *args)

    for _ in range(2):
        assert "has size 16, this command has 20: give another --out" in bad("--size", 20)
        assert "has crops 0, this command has 1" in bad("--crops", 1)
        assert "has seed 0, this command has 3" in bad("--seed", 3)
        assert "has dataset" in bad("--dataset", f"folder:{tmp_path}/others")
        (out / "blocks").mkdir(exist_ok=True)  # and if it is not whole
    (out / "blocks").rmdir()
    (pets / "cats" / "00.png").rename(pets / "cats" / "a.png")
    assert "has md5" in bad()
    (pets / "cats" / "a.png").unlink()
    assert "has images 18, this command has 17" in bad()
    assert content(out) == whole
    (out / "classes.json").write_text("{")
    assert "classes.json is damaged" in bad()
    (out / "classes.json").unlink()
    assert "holds something else" in bad()
    assert "holds something else" in bad(out=tmp_path)
    assert "there is no folder" in bad("--dataset", "folder:none")
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((5, 4, 8, 8), np.float32))
    assert "no images of 8 bits" in bad("--dataset", f"npz:{tmp_path}/floats.npz")
    assert "invalid choice" in fails(monkeypatch, capsys, "data.py", "decode")
    assert "are required: command, --dataset, --out" in fails(monkeypatch, capsys, "data.py")


def test_damaged_folders_are_one_line(pets, tmp_path, vae):
    out = encode(pets, tmp_path / "a", "--vae", vae)
    first, second, _ = whole = content(out)
    info = json.loads(whole[2])
    array, labels = np.load(out / "latents.npy"), np.load(out / "labels.npy")

    def bad(name, new):
        if isinstance(new, np.ndarray):
            np.save(out / name, new)
        elif isinstance(new, dict):
            (out / name).write_text(json.dumps(new))
        else:
            (out / name).write_bytes(new)
        with pytest.raises(ValueError) as error:
            data.load(f"latents:{out}")
        (out / name).write_bytes(whole[FILES.index(name)])
        assert "\n" not in str(error.value) and f"{out} is damaged" in str(error.value)
        return str(error.value)

    bad("latents.npy", first[:-1])
    bad("latents.npy", first[:50])
    bad("latents.npy", b"")
    assert "float32" in bad("latents.npy", array.astype(np.float32))
    assert "latents.npy is float16 (17, 2" in bad("latents.npy", array[1:])
    assert "latents.npy is" in bad("latents.npy", array[..., 1:])
    array[3, 0, 0, 0, 0] = np.nan
    assert "not finite" in bad("latents.npy", array)
    bad("labels.npy", second[:-1])
    assert "labels.npy is int64 (17,) for 18 images" in bad("labels.npy", labels[1:])
    assert "labels.npy is float64" in bad("labels.npy", labels.astype(np.float64))
    assert "than those of 2 classes" in bad("labels.npy", labels + 1)
    assert "than those of 2 classes" in bad("labels.npy", labels - 1)
    bad("classes.json", b"{")
    bad("classes.json", b"[1]")
    bad("classes.json", {})
    bad("classes.json", info | {"shape": [18, 2, 4, 8, 9]})
    bad("classes.json", info | {"vae": None})
    for name in FILES:
        (out / name).rename(tmp_path / name)
        with pytest.raises(ValueError, match="is damaged"):
            latents.load(out)
        (tmp_path / name).rename(out / name)
    with pytest.raises(ValueError, match=r"there is no folder .*none"):
        data.load(f"latents:{tmp_path}/none")
    with pytest.raises(ValueError, match="is 8 x 8, and views are not resized to 16"):
        data.load(f"latents:{out}", size=16)
    with pytest.raises(ValueError, match="no test split"):
        data.load(f"latents:{out}", split="test")
    assert len(data.load(f"latents:{out}", size=8)[0]) == 18


# Drawing them


def test_sampler_draws_views():
    """Every image and view says which it is; a mapped array and a slice of the views work, too."""
    number = torch.arange(60).view(60, 1) * 4 + torch.arange(4)
    images = number.half().view(60, 4, 1, 1, 1).expand(60, 4, 2, 3, 3)
    labels = torch.arange(60) % 3
    for some in (images, images[:, :2], images[:, 2:], images[:, 1:]):
        sampler, g = data.Sampler(some, labels, "cpu", flip=True), torch.Generator().manual_seed(0)
        offset, views = some[0, 0, 0, 0, 0].long(), some.shape[1]
        asked = torch.tensor([2, 0])
        pos, unc = sampler.draw(asked, 20, 400, g)
        assert pos.dtype == torch.float32 and pos.shape == (2, 20, 2, 3, 3)
        found = pos[..., 0, 0, 0].long()
        assert torch.equal(labels[found // 4], asked[:, None].expand(2, 20))
        assert (found // 4).sort().values.diff().ne(0).all()  # without replacement
        drawn, drawn_labels = sampler.batch(800, g)
        assert torch.equal(labels[drawn[:, 0, 0, 0].long() // 4], drawn_labels)
        for batch in (unc.flatten(0, 1), drawn):
            number = batch[:, 0, 0, 0].long()
            count = (number % 4 - offset).bincount(minlength=views)
            assert len(count) == views and (count - 800 / views).abs().max() < 100
            assert len((number // 4).unique()) == 60


def test_ranks_draw_their_share_of_the_views():
    images, labels = torch.rand(12, 2, 1, 4, 4).half(), torch.arange(12) % 3
    sampler, asked = data.Sampler(images, labels, "cpu"), torch.tensor([0, 1, 2, 1])
    whole, _ = sampler.draw(asked, 3, 2, torch.Generator().manual_seed(1))
    share, _ = sampler.draw(asked, 3, 2, torch.Generator().manual_seed(1), slice(2, 4))
    assert torch.equal(share, whole[2:])
