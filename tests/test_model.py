"""The generator, beyond the authors' numbers in test_drift.py."""

import numpy as np
import torch

from conftest import ASSETS, tiny
from model import DiT, DiTConfig, rope_1d, rotate, sincos_2d

GOLDEN = np.load(ASSETS / "golden_generator.npz")  # computed with the authors' JAX code


def golden(key):
    return torch.from_numpy(GOLDEN[key])


def test_official_positions():
    assert (sincos_2d(64, 4)[0] - golden("init_pos_embed_dim64_grid4")).abs().max() < 1e-6
    cos, sin = rope_1d(16, 20)
    for name in ("q", "k"):
        turned = rotate(golden(f"rope/{name}").transpose(1, 2), cos, sin).transpose(1, 2)
        assert (turned - golden(f"rope/{name}_out")).abs().max() < 1e-5


def test_image_depends_on_every_input_and_on_nothing_else():
    model = tiny()
    noise, style = model.draw(2, torch.Generator().manual_seed(0))
    args = [noise, style, torch.tensor([1, 2]), torch.tensor([1.0, 2.0])]
    image = model(*args)
    assert torch.equal(image, model(*args))
    others = [noise + 1, (style + 1) % 64, torch.tensor([3, 4]), torch.tensor([3.0, 4.0])]
    for i, other in enumerate(others):
        changed = model(*args[:i], other, *args[i + 1 :])
        assert not torch.allclose(image, changed, atol=1e-5), i


def test_generate_is_the_same_in_any_batch():
    model, label = tiny(), torch.arange(10)
    whole = model.generate(label, 1.5, torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(5)
    parts = torch.cat([model.generate(part, 1.5, g) for part in label.split(3)])
    torch.testing.assert_close(whole, parts)
    assert whole.std() > 0.1
    each = model.generate(label, torch.full((10,), 1.5), torch.Generator().manual_seed(5))
    torch.testing.assert_close(whole, each)


def test_a_new_class_is_the_mean_of_the_old():
    model = tiny()
    mean = model.label_embed.weight.mean(0)
    model.resize_classes(3)
    assert model.config.num_classes == 3 and model.label_embed.weight.requires_grad
    torch.testing.assert_close(model.label_embed.weight, mean.expand(3, -1))


def test_an_untrained_generator_gives_zeros_and_a_gradient():
    model = DiT(DiTConfig.named("tiny", input_size=8, in_channels=1, patch_size=4, num_classes=10))
    noise, style = model.draw(2, torch.Generator().manual_seed(0))
    image = model(noise, style, torch.tensor([1, 2]), torch.ones(2))
    assert (image == 0).all()
    (image * torch.randn_like(image)).sum().backward()
    assert model.final_proj.weight.grad.norm() > 0
