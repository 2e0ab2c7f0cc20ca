"""The ResNet-MAE: its training, its loss, its mask, and its files."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import mae
from conftest import ASSETS

GOLDEN = np.load(ASSETS / "golden_mae.npz")  # computed with the authors' JAX code
SMALL = dict(width=8, patch=1, layers=(1, 1, 1, 1), batch=32)


def digits():
    images, labels, _ = data.load("digits", size=16)
    return data.Sampler(images, labels, "cpu")


def test_training_lowers_the_loss_and_writes_a_file_and_a_picture(tmp_path, capsys):
    path = tmp_path / "new" / "a.pt"
    mae.train(digits(), 10, path, steps=80, cls_steps=40, **SMALL)
    first, last = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert last < 0.6 * first
    assert Image.open(path.with_suffix(".png")).size == (10 * 4 * 18, 3 * 4 * 18)
    net, x = mae.load(path), torch.randn(10, 1, 16, 16)
    mask = mae.draw_mask(10, 16, 1, torch.Generator().manual_seed(0))
    filled, logits = net(x, mask)
    assert filled.shape == x.shape and logits.shape == (10, 10)
    assert torch.equal(filled, net(x * (1 - mask), mask)[0])  # what is hidden is not seen


def test_an_encoder_that_diverges_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        mae.train(digits(), 10, tmp_path / "a.pt", steps=9, lr=1e30, **SMALL)
    assert not [*tmp_path.iterdir()]


def test_an_average_of_the_weights_is_saved(tmp_path):
    weights = {}
    for ema in (0.0, 0.9995):  # of the same training; 0: the last weights
        mae.train(digits(), 10, tmp_path / "a.pt", steps=4, ema=ema, **SMALL)
        weights[ema] = mae.load(tmp_path / "a.pt").stem[0].weight
    assert not torch.equal(*weights.values())


@pytest.mark.parametrize("size, patch", [(8, 1), (16, 1), (40, 2), (48, 3), (64, 4)])
def test_the_encoder_of_the_data_is_trained_once(tmp_path, monkeypatch, size, patch):
    calls = []

    def train(sampler, classes, path, **how):
        calls.append((classes, how))
        Path(path).touch()

    monkeypatch.setattr(mae, "train", train)
    images = torch.randint(0, 256, (1002, 1, size, size), dtype=torch.uint8)
    sampler = data.Sampler(images, torch.zeros(1002).long(), "cpu")
    path = mae.of_data(sampler, 3, tmp_path)
    assert path == f"{tmp_path}/mae-{zlib.crc32(images.numpy().tobytes()):08x}-1000.pt"
    assert mae.of_data(sampler, 3, tmp_path) == path
    assert calls == [(3, dict(patch=patch, steps=1000))]
    images[-1] = 255 - images[-1]  # other data
    assert mae.of_data(data.Sampler(images, sampler.labels, "cpu"), 3, tmp_path) != path


def test_latents_of_two_views_have_no_picture(tmp_path):
    latents = torch.randn(12, 2, 4, 8, 8).half()
    np.save(tmp_path / "latents.npy", latents.numpy())
    np.save(tmp_path / "labels.npy", np.arange(12) % 3)
    flags = "--steps 2 --batch 4 --width 8 --patch 1 --layers 1 1 1 1 --cls_steps 2 --device cpu"
    out = tmp_path / "a.pt"
    mae.main(["--dataset", f"latents:{tmp_path}", *flags.split(), "--out", str(out)])
    config = mae.load(out).config
    assert (config["channels"], config["size"], config["num_classes"]) == (4, 8, 3)
    assert not out.with_suffix(".png").exists()


def test_the_loss_is_summed_over_channels_and_a_mean_over_locations():
    images, filled = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    mask = mae.draw_mask(2, 8, 2, torch.Generator().manual_seed(0))
    expected = []
    for x, y, m in zip(images, filled, mask, strict=True):
        patches = (x - y).unfold(1, 2, 2).unfold(2, 2, 2)  # [3, 4, 4, 2, 2]: officially 12 channels
        expected.append(patches.square().sum((0, 3, 4))[m[0, ::2, ::2] == 1].mean())
    found = mae.reconstruction(filled, images, mask, 2)
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_masks_hide_half_of_the_squares_of_2_x_2_locations():
    mask = mae.draw_mask(500, 18, 2, torch.Generator().manual_seed(0))
    assert mask.shape == (500, 1, 18, 18) and set(mask.unique().tolist()) == {0, 1}
    assert mask.mean().item() == pytest.approx(0.5, abs=0.02)
    squares = mask[..., :16, :16].unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert (squares == squares[..., :1]).all()


@pytest.mark.parametrize("patch", [2, 4])
def test_patches_are_ordered_as_the_official_ones(patch):
    net, seen = mae.MAE(width=8, size=8 * patch, patch=patch), []
    net.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.from_numpy(GOLDEN["patch_input/x"]).permute(0, 3, 1, 2)  # 8 x 8
    net.features(image.repeat(1, 1, patch, patch))
    corner = seen[0][:, :, : 8 // patch, : 8 // patch].permute(0, 2, 3, 1)
    assert torch.equal(corner, torch.from_numpy(GOLDEN[f"patch_input/out_{patch}"]))
