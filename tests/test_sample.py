"""Sampling from a checkpoint: to a grid, a folder, an .npz; beside the nearest real images."""

import numpy as np
import torch
from PIL import Image

import data
from conftest import QUICK, fails, run, train, write_folder


def test_sample(monkeypatch, tmp_path, checkpoint, capsys):
    common = ["sample.py", "--ckpt", checkpoint, "--n", 25, "--cfg", 1.5, "--seed", 3]

    def draw(name, *more):
        run(monkeypatch, *common, "--out", tmp_path / name, *more)
        return np.load(tmp_path / name) if name.endswith(".npz") else tmp_path / name

    a = draw("a.npz")
    assert "images/s" in capsys.readouterr().out
    assert a["arr_0"].shape == (25, 8, 8, 1) and a["arr_0"].dtype == np.uint8
    assert a["labels"].tolist() == [i % 10 for i in range(25)]
    pixels = a["arr_0"].astype(int)
    assert pixels.std() > 10
    b = draw("b.npz", "--batch", 7)
    # rounding: batches multiply in another order
    assert np.abs(pixels - b["arr_0"]).max() <= 1
    c = draw("c.npz", "--seed", 4)
    assert np.abs(pixels - c["arr_0"]).max() > 10
    files = sorted(path.name for path in draw("files", "--classes", 3, 5).iterdir())
    assert len(files) == 25 and files[:2] == ["000000_class3.png", "000001_class5.png"]
    first = np.asarray(Image.open(tmp_path / "files" / files[0]))
    assert first.shape == (8, 8) and not (first == pixels[0, :, :, 0]).all()  # of another class
    with Image.open(draw("grid.png")) as grid:
        assert grid.size == (5 * 70, 5 * 70)
        top = np.asarray(grid)[7:63:7, 7:63:7]  # the first tile, enlarged seven times
    assert (top == pixels[0, :, :, 0]).all()


def test_nearest(monkeypatch, tmp_path, checkpoint, capsys):
    common = ["sample.py", "--ckpt", checkpoint, "--n", 25, "--nearest"]
    run(monkeypatch, *common, "digits", "--out", tmp_path / "near.png")
    near = np.asarray(Image.open(tmp_path / "near.png"))
    assert near.shape == (6 * 70, 16 * 70)  # two rows of 16, of three kinds
    run(monkeypatch, *common[:-1], "--out", tmp_path / "a.npz")
    top = np.load(tmp_path / "a.npz")["arr_0"][0, :, :, 0].astype(int)
    assert (near[7:63:7, 7:63:7] == top).all()
    images, labels, _ = data.load("digits")
    digits = images[:, 0].numpy().astype(int)
    closest = np.square(digits - top).sum((1, 2)).argmin()
    assert (near[77:133:7, 7:63:7] == digits[closest]).all()
    random = near[147:203:7, 7:63:7]
    same = (digits == random).all((1, 2))
    assert 0 in labels[torch.from_numpy(same)]  # a real image, of the class

    def bad(what, out):
        return fails(monkeypatch, capsys, *common, what, "--out", tmp_path / out)

    assert "for a grid" in bad("digits", "b.npz")
    assert "not seen" in bad(f"folder:{write_folder(tmp_path / 'pets')}", "b.png")


def test_floats_of_one_channel_are_pictures_too(monkeypatch, tmp_path):
    """A grid of 8 bits, the nearest of the floats below them; but an .npz of floats."""
    floats = np.linspace(-2, 2, 41, dtype=np.float32)[:, None, None, None] * np.ones((8, 8))
    np.savez(tmp_path / "f.npz", arr_0=floats)
    name = f"npz:{tmp_path}/f.npz"
    plan = [*QUICK, "--dataset", name, "--encoder", "pixels", "--steps", 1]
    train(*plan, "--out", tmp_path / "a.pt")
    draw = ["sample.py", "--ckpt", tmp_path / "a.pt", "--n", 4, "--out"]
    run(monkeypatch, *draw, tmp_path / "a.npz")
    images = np.load(tmp_path / "a.npz")["arr_0"]
    assert images.shape == (4, 1, 8, 8) and images.dtype == np.float32
    run(monkeypatch, *draw, tmp_path / "a.png", "--nearest", name)
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    assert grid.shape == (3 * 70, 4 * 70) and grid.dtype == np.uint8
    shown = data.to_uint8(torch.from_numpy(images[0, 0])).numpy()
    assert (grid[7:63:7, 7:63:7] == shown).all()
    assert (grid[77:133:7, 7:63:7] == 128).all()  # 0, as the sample nearly is


def test_guidance_out_of_range_is_noted(monkeypatch, tmp_path, checkpoint, capsys):
    command = ["sample.py", "--ckpt", checkpoint, "--n", 1, "--out", tmp_path / "a.png", "--cfg"]
    run(monkeypatch, *command, 4)
    assert "note" not in capsys.readouterr().out
    run(monkeypatch, *command, 4.5)
    assert "note: trained for --cfg from 1 to 4.0, not for 4.5" in capsys.readouterr().out


def test_sample_bad_input(monkeypatch, tmp_path, checkpoint, capsys):
    out = tmp_path / "keep.png"
    out.write_text("precious")

    def bad(ckpt, *args):
        return fails(monkeypatch, capsys, "sample.py", "--out", out, "--ckpt", ckpt, *args)

    assert "no checkpoint" in bad(tmp_path / "none.pt")
    whole = checkpoint.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": 1}, tmp_path / "other.pt")
    for name in ("cut.pt", "text.pt", "other.pt"):
        assert name in bad(tmp_path / name)
    assert "0 to 9" in bad(checkpoint, "--classes", 3, 10)
    assert "0 to 9" in bad(checkpoint, "--classes", -1)
    assert "must be from 1" in bad(checkpoint, "--n", 0)
    assert "--nonsense" in bad(checkpoint, "--nonsense", 1)
    assert "none is not to be had" in bad(checkpoint, "--device", "none")
    assert out.read_text() == "precious"
    assert "a.jpg: name a .png" in bad(checkpoint, "--out", tmp_path / "a.jpg")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.png").write_text("old")
    assert "not empty" in bad(checkpoint, "--out", tmp_path / "full")
