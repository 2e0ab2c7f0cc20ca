"""Pixels, networks of timm and the ResNet-MAE as features, by hand and by the authors' numbers."""

import sys

import pytest
import torch

import features
from conftest import golden, needs, our_convnext, relative
from mae import MAE


def shapes(feats):
    return {name: tuple(f.shape[1:]) for name, f in feats.items()}


def timm_net(name, size):
    needs("timm")
    return features.Timm(name, size, pretrained=False)


def test_pixels_pools_and_windows_by_hand():
    x = torch.randn(2, 3, 8, 8)
    feats = features.Encoder(["pixels", "pool:4", "window:4"], 3, 8)(x)
    assert shapes(feats) == {"pixels": (1, 192), "pool:4": (1, 12), "window:4": (9, 48)}
    assert torch.equal(feats["pixels"][:, 0], x.flatten(1))
    torch.testing.assert_close(feats["pool:4"][1, 0, 5], x[1, 1, :4, 4:].mean())
    # 3 x 3 windows, two pixels apart
    assert torch.equal(feats["window:4"][1, 5], x[1, :, 2:6, 4:8].flatten())


def test_convnext_gives_the_official_features():
    """Features and gradient of a small one, computed with the authors' JAX code."""
    needs("timm")
    stored = {name: torch.from_numpy(array) for name, array in golden("convnext").items()}
    x = stored["x"].permute(0, 3, 1, 2).requires_grad_()
    feats = our_convnext().features(x)
    assert {f"act/{name}" for name in feats} == {name for name in stored if name[:4] == "act/"}
    total = 0
    for name, f in feats.items():
        assert relative(f, stored[f"act/{name}"]) < 5e-6, name
        total = total + (f.flatten() * torch.arange(f.numel()).float().cos()).sum()
    total.backward()
    assert relative(x.grad, stored["grad_x"].permute(0, 3, 1, 2)) < 1e-4


def test_folding_changes_no_output_and_leaves_no_batch_norm():
    needs("timm")
    import timm

    net, x = timm.create_model("mobilenetv2_100").eval(), torch.randn(2, 3, 64, 64)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    before = net(x)
    assert relative(features.fold(net)(x), before) < 1e-4
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())


@pytest.mark.parametrize("size", [32, 64])
def test_a_mobilenet_gives_five_stages(size):
    maps = timm_net("mobilenetv2_100", size).features(torch.randn(1, 1, 32, 32))
    expected = [(24, 4), (32, 8), (64, 16), (96, 16), (160, 32)]  # channels and stride
    assert [f.shape[1:] for f in maps.values()] == [(C, size // k, size // k) for C, k in expected]


def test_a_transformer_gives_its_tokens():
    net, x = timm_net("test_vit", 64), torch.rand(1, 3, 64, 64) * 2 - 1
    maps = net.features(x)
    assert shapes(maps) == {"tokens": (64, 4, 4), "cls": (1, 64)}
    tokens = net.net.forward_features(((x + 1) / 2 - net.mean) / net.std)
    torch.testing.assert_close(torch.cat([maps["cls"], maps["tokens"].flatten(2).mT], 1), tokens)
    siglip = timm_net("vit_base_patch16_siglip_224", 32)  # without a class token
    assert shapes(siglip.features(x)) == {"tokens": (768, 2, 2)}


def test_encoders_of_files_mix_and_gradients_reach_the_images(tmp_path):
    vit, net, x = timm_net("test_vit", 32), MAE(width=8), torch.randn(2, 3, 32, 32)
    torch.save(vit.net.state_dict(), tmp_path / "a@1.pth")
    torch.save(dict(config=net.config, model=net.state_dict()), tmp_path / "a.pt")
    name = f"timm:test_vit@32={tmp_path}/a@1.pth"
    encode = features.Encoder([name, f"{tmp_path}/a.pt", "pixels"], 3, 32)
    feats, alone = encode(x.requires_grad_()), features.multiscale(net.features(x))
    tokens = vit.features(x)["tokens"].flatten(2).mT
    torch.testing.assert_close(feats[f"{name}.tokens"], tokens)
    assert torch.equal(feats[f"{tmp_path}/a.pt.layer4_mean"], alone["layer4_mean"])
    for f in feats.values():
        assert torch.autograd.grad(f.square().sum(), x, retain_graph=True)[0].norm() > 0
    assert not any(p.requires_grad for p in encode.parameters())


def test_what_is_no_encoder_is_one_line(tmp_path, monkeypatch):
    def bad(name, channels=3):
        with pytest.raises(ValueError) as error:
            features.Encoder([name], channels, 32)
        assert "\n" not in str(error.value)
        return str(error.value)

    for name in ("window:3", "window:64", "window:20", "pool:0", "pool:x"):
        assert f"{name} does not fit images of 32 pixels" in bad(name)
    assert "no encoder none:" in bad("none") and "no checkpoint none.pt" in bad("none.pt")
    net, path = MAE(width=8), tmp_path / "a.pt"
    torch.save(dict(config=net.config, model=net.state_dict()), path)
    assert "(3, 32), not (1, 32)" in bad(str(path), channels=1)
    assert "1 or 3 channels, not 4" in bad("dinov2", channels=4)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "try --encoder pixels pool:2 pool:4 mae" in bad("dinov2")
