"""The path of docs/imagenet.md: labels in parts, recipes, ConvNeXt-V2, statistics, latents."""

import re

import numpy as np
import pytest
import torch

import data
import features
import fid
import latents
import train as training
from conftest import ASSETS, fails, needs, photographs, relative, run, train


def problem(tiny_mae):
    """A step of 6 labels, float64, and its encoder."""
    args, _ = training.parse(["--n_gen", "5", "--floor", "1e-6"])
    encode = features.Encoder(str(tiny_mae), 3, 16, [2]).double()
    x, pos, unc = (
        torch.randn(30, 3, 16, 16),
        torch.rand(6, 4, 3, 16, 16),
        torch.randn(6, 2, 3, 16, 16),
    )
    alpha = torch.tensor([1, 1.5, 1, 3, 2, 1])
    return [t.double() for t in (x, pos, unc, alpha)], encode, args


@pytest.mark.parametrize("n, size", [(3, 15), (2, 4), (1, 5)])
def test_labels_in_parts_give_the_same_gradient(tiny_mae, n, size):
    images, encode, args = problem(tiny_mae)
    whole, of_whole = training.images_gradient_by_labels(*images, encode, args, 30, 6)
    dx, stats = training.images_gradient_by_labels(*images, encode, args, size, n)
    assert whole.norm() > 0 and relative(dx, whole) < 1e-9
    assert stats.keys() == of_whole.keys()
    for name in stats:
        torch.testing.assert_close(stats[name], of_whole[name], rtol=1e-9, atol=0)


def test_labels_in_parts_hold_the_features_of_one(tiny_mae, monkeypatch):
    images, encode, args = problem(tiny_mae)
    most = []
    normalised = training.drift.normalised_drift

    def watched(targets, *rest):
        y = list(targets)
        most.append(sum(t.nbytes for t in y))
        return normalised(iter(y), *rest)

    monkeypatch.setattr(training.drift, "normalised_drift", watched)
    training.images_gradient_by_labels(*images, encode, args, 30, 6)
    training.images_gradient_by_labels(*images, encode, args, 5, 1)
    assert max(most[1:]) * 6 == most[0]


def test_parts_of_labels_are_equal():
    args, _ = training.parse(["--labels", "12", "--n_gen", "8", "--label_batch", "5"])
    assert training.choose_parts(args, 12, None, None) == (4, 32)
    args.micro_batch = 10
    assert training.choose_parts(args, 12, None, None) == (4, 8)
    args.label_batch = None
    assert training.choose_parts(args, 12, None, None) == (12, 10)


RECIPES = """
latent-ablation  B   64  64   64  16  2e-4   5000  3  0    0.01   30000
latent-L         L  128  64   64  32  4e-4  10000  3  0.5  0.01  200000
latent-B         B  128  64   64  32  4e-4  10000  5  0    0     200000
pixel-L          L  128  64  128  32  4e-4  10000  5  0    0.01  100000
pixel-B          B  128  64  128  32  2e-4  10000  5  0    0.01  100000
"""


@pytest.mark.parametrize("line", RECIPES.strip().splitlines())
def test_recipes(line):
    name, model, *numbers = line.split()
    args, _ = training.parse(["--dataset", f"imagenet-{name}:somewhere"])
    columns = [
        "labels",
        "n_gen",
        "n_pos",
        "n_unc",
        "lr",
        "warmup",
        "alpha_k",
        "alpha_one",
        "wd",
        "steps",
    ]
    assert [getattr(args, c) for c in columns] == [float(n) for n in numbers]
    assert (args.model, args.dataset) == (model, "latents:somewhere")
    assert (args.iters, args.floor, args.decay, args.ema) == (1, 1e-6, 0, 0.999)
    assert training.schedule(args.steps - 1, args) == 1
    assert args.patch == (2 if "latent" in name else 16)


def test_convnext_gives_the_official_features():
    """Features and gradient of a small one, computed with the official code."""
    needs("timm")
    from timm.models.convnext import ConvNeXt

    net = features.ConvNeXtV2.__new__(features.ConvNeXtV2)
    torch.nn.Module.__init__(net)
    net.size = 224
    shape = dict(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64))
    net.net = ConvNeXt(**shape, use_grn=True, ls_init_value=None, num_classes=0)
    theirs = [
        (r"^stem\.(\d)", r"downsample_layers_0.layers_\1"),
        (r"stages\.(\d)\.downsample\.(\d)", r"downsample_layers_\1.layers_\2"),
        (r"stages\.(\d)\.blocks\.(\d)", r"stages_\1.layers_\2"),
        ("conv_dw", "dwconv"),
        (r"mlp\.fc(\d)", r"pwconv\1"),
        (r"mlp\.grn", "grn"),
        (r"head\.norm", "norm"),
    ]
    with np.load(ASSETS / "golden_convnext.npz") as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files}
    state = {}
    for name, parameter in net.net.state_dict().items():
        key = name
        for ours, other in theirs:
            key = re.sub(ours, other, key)
        *place, leaf = key.split(".")
        leaves = ("weight", "kernel", "scale", "gamma") if leaf == "weight" else ("bias", "beta")
        found = ["/".join(["params", *place, other]) for other in leaves]
        [array] = [golden.pop(key) for key in found if key in golden]
        order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, (0,))
        array = array if array.ndim == 4 and "grn" in key else array.permute(order)
        state[name] = array.reshape(parameter.shape)
    assert not [name for name in golden if name.startswith("params")]
    net.net.load_state_dict(state)

    x = golden["x"].permute(0, 3, 1, 2).requires_grad_()
    feats = net.eval().features(x)
    assert {f"act/{name}" for name in feats} == {name for name in golden if name[:4] == "act/"}
    total = 0
    for name, f in feats.items():
        assert relative(f, golden[f"act/{name}"]) < 5e-6, name
        total = total + (f.flatten() * torch.arange(f.numel()).float().cos()).sum()
    total.backward()
    assert relative(x.grad, golden["grad_x"].permute(0, 3, 1, 2)) < 1e-4


def test_published_statistics_and_truncation(monkeypatch, tmp_path, capsys, stubs, checkpoint):
    common = ["--inception", stubs / "original.pt", "--data_dir", tmp_path, "--device", "cpu"]
    common += ["--ckpt", checkpoint, "--n", 40]

    def score(*args):
        capsys.readouterr()
        run(monkeypatch, "fid.py", *common, *args)
        return capsys.readouterr().out

    own = score("--dataset", "digits")
    [kept] = tmp_path.glob("fid-*.npz")
    with np.load(kept) as ref:
        mean, cov = ref["mean"], ref["cov"]
    np.savez(tmp_path / "a.npz", mu=mean, sigma=cov)
    np.savez(tmp_path / "b.npz", ref_mu=mean, ref_sigma=cov)
    value = re.search(r"FID-40 ([\d.]+)", own)[1]
    for name in "ab":
        line = score("--ref", tmp_path / f"{name}.npz")
        assert f"FID-40 {value}" in line and "published statistics" in line
        assert "precision" not in line
    both = score("--ref", tmp_path / "a.npz", "--dataset", "digits")
    assert f"FID-40 {value}" in both
    assert re.search(r"precision [\d.]+  recall [\d.]+", both)[0] in own
    cut = score("--dataset", "digits", "--truncate")
    assert "inception2015-original-truncated" in cut

    np.savez(tmp_path / "other.npz", mu=mean[:7], sigma=cov[:7, :7])
    np.savez(tmp_path / "no.npz", mu=mean)
    line = fails(monkeypatch, capsys, "fid.py", *common, "--ref", tmp_path / "other.npz")
    assert "statistics of 7 features" in line
    line = fails(monkeypatch, capsys, "fid.py", *common, "--ref", tmp_path / "no.npz")
    assert "has no mu and sigma" in line


def test_truncated_images_are_those_of_the_authors(monkeypatch):
    class Ramp:
        config = type("Config", (), dict(num_classes=2))

        def generate(self, label, alpha, generator):
            return torch.tensor([[[[-1.5, -1, 0.9999 / 127.5 - 1, 1.5]]]]).expand(
                len(label), 3, 1, 4
            )

    args = type("Args", (), dict(device="cpu", seed=0, batch=2, truncate=True))
    for truncate, expected in ((True, [0, 0, 0, 255]), (False, [0, 0, 1, 255])):
        args.truncate = truncate
        [batch] = fid.draw_samples(Ramp(), 2, 1.0, args, None)
        assert batch.dtype == torch.uint8 and batch[0, 0, 0].tolist() == expected


def test_the_whole_path_from_images_to_samples(monkeypatch, tmp_path, capsys, stubs):
    """Photographs, an autoencoder trained on them, latents, an encoder, a generator, FID."""
    needs("diffusers")
    monkeypatch.chdir(tmp_path)
    np.savez(
        "photos.npz", arr_0=photographs().permute(0, 2, 3, 1).numpy(), labels=np.arange(200) // 20
    )
    run(monkeypatch, "docs/small_vae.py", "--dataset", "npz:photos.npz", "--steps", 40)
    encode = ["encode", "--dataset", "npz:photos.npz", "--size", 32, "--vae", "vae/", "--crops", 2]
    run(monkeypatch, "data.py", *encode, "--out", "latents/")
    found, _, names, _ = latents.load("latents/")
    assert found.shape == (200, 4, 4, 8, 8) and len(names) == 10
    assert 0.5 < found.float().std() < 2  # the factor makes it about 1
    vae = latents.load_vae("vae/", "cpu")
    seen = latents.decode(vae, found[:, 0].float())
    real = data.to_float(photographs())
    error, spread = (seen - real).abs().mean(), (real - real.mean()).abs().mean()
    assert error < 0.75 * spread  # of an autoencoder of 40 steps
    assert (latents.decode(vae, found[:, 1].float()) - real.flip(-1)).abs().mean() < 0.75 * spread

    mae = ["--dataset", "latents:latents/", "--patch", 1, "--width", 8, "--layers", 1, 1, 1, 1]
    run(monkeypatch, "mae.py", *mae, "--steps", 10, "--batch", 16, "--out", "mae.pt")
    plan = ["--dataset", "latents:latents/", "--encoder", "mae.pt", "--n_gen", 8, "--n_pos", 8]
    plan += ["--n_unc", 4, "--labels", 4, "--label_batch", 2, "--eval_every", 1, "--device", "cpu"]
    train(*plan, "--steps", 2, "--vae", "vae/", "--out", "a.pt")
    assert "0.0" in capsys.readouterr().out
    size = data.read_image(tmp_path / "samples.png").size
    assert min(size) >= 32 * 2  # decoded, two rows of at least 32 pixels
    run(monkeypatch, "sample.py", "--ckpt", "a.pt", "--vae", "vae/", "--n", 20, "--out", "x.npz")
    assert data.load("npz:x.npz")[0].shape == (20, 3, 32, 32)
    common = ["--inception", stubs / "original.pt", "--data_dir", tmp_path, "--n", 20]
    run(
        monkeypatch, "fid.py", "--ckpt", "a.pt", "--vae", "vae/", "--dataset", "photos.npz", *common
    )
    assert "FID-20" in capsys.readouterr().out

    def bad(*args):
        return fails(monkeypatch, capsys, "train.py", "--out", "b.pt", *args)

    assert "is of the autoencoder vae/, not other" in bad(*plan, "--vae", "other")
    assert "not resized to 16" in bad(*plan, "--size", 16)
    assert "--fid_every needs images of 8 bits" in bad(*plan, "--fid_every", 1)
    line = fails(
        monkeypatch, capsys, "fid.py", "--ckpt", "a.pt", "--dataset", "photos.npz", *common
    )
    assert "gives latents, which --vae decodes" in line
