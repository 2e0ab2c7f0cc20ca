"""The generator, beyond the authors' numbers in test_drift.py."""

import pytest
import torch

from conftest import tiny_generator
from model import SIZES, DiT, DiTConfig


@pytest.mark.parametrize(
    "name, hidden, blocks, millions",
    [("S", 1024, 12, 34), ("B", 2048, 12, 133), ("L", 2752, 24, 463)],
)
def test_sizes(name, hidden, blocks, millions):
    """For latents of ImageNet; those of B and L have the paper's parameters. hidden: of SwiGLU."""
    with torch.device("meta"):
        net = DiT(DiTConfig(**SIZES[name], in_channels=4, num_classes=1000))
    assert len(net.blocks) == blocks
    assert net.blocks[0].mlp.w2.in_features == hidden
    assert net.pos_embed.shape[1] == 256 and net.rope.shape == (2, 256 + 16, 64)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions


def test_an_image_is_the_same_in_any_batch():
    net, label = tiny_generator(), torch.arange(10)
    whole = net.generate(label, 1.5, torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(5)
    parts = torch.cat([net.generate(part, 1.5, g) for part in label.split(3)])
    torch.testing.assert_close(whole, parts)
    each = net.generate(label, torch.full((10,), 1.5), torch.Generator().manual_seed(5))
    torch.testing.assert_close(whole, each)
    assert whole.shape == (10, 1, 8, 8) and whole.std() > 0.1


def test_without_the_noise_image_the_style_alone_makes_samples_differ():
    net, g = tiny_generator(noise_image=False), torch.Generator()
    (noise, style), label, alpha = net.draw(4, g), torch.arange(4), torch.ones(4)
    images = net(noise, style, label, alpha)
    assert torch.equal(images, net(-noise, style, label, alpha))
    assert not torch.allclose(images, net(noise, style.flip(0), label, alpha))
    fresh = DiT(DiTConfig(**SIZES["tiny"], noise_image=False))
    for table, std in ((fresh.style_embed, 0.2), (fresh.label_embed, 0.5)):
        assert table.weight.std().item() == pytest.approx(std, rel=0.1)
