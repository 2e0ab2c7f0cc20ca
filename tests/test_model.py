"""The generator, beyond the authors' numbers in test_drift.py."""

import pytest
import torch

import model
from conftest import save_generator, tiny_generator
from model import DiT, DiTConfig


@pytest.mark.parametrize(
    "name, hidden, blocks, millions",
    [("S", 1024, 12, 34), ("B", 2048, 12, 133), ("L", 2752, 24, 463)],
)
def test_sizes(name, hidden, blocks, millions):
    """For latents of ImageNet; those of B and L have the paper's parameters. hidden: of SwiGLU."""
    with torch.device("meta"):
        net = DiT(DiTConfig.named(name, in_channels=4, num_classes=1000))
    assert len(net.blocks) == blocks
    assert net.blocks[0].mlp.w2.in_features == hidden
    assert net.pos_embed.shape[1] == 256 and net.rope_cos.shape == (256 + 16, 64)
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


def test_an_image_depends_on_every_input():
    net = tiny_generator()
    noise, style = net.draw(2, torch.Generator().manual_seed(0))
    args = [noise, style, torch.tensor([1, 2]), torch.tensor([1.0, 2.0])]
    others = [noise + 1, (style + 1) % 64, torch.tensor([3, 4]), torch.tensor([3.0, 4.0])]
    for i, other in enumerate(others):
        assert (net(*args) - net(*args[:i], other, *args[i + 1 :])).norm() > 1e-3, i


def test_a_new_class_is_the_mean_of_the_old():
    net = tiny_generator()
    mean = net.label_embed.weight.mean(0)
    net.resize_classes(3)
    assert net.config.num_classes == 3 and net.label_embed.weight.requires_grad
    torch.testing.assert_close(net.label_embed.weight, mean.expand(3, -1))


def test_load(tmp_path):
    net, path = tiny_generator(), tmp_path / "a.pt"
    save_generator(net, path, list("0123456789"))
    loaded, checkpoint = model.load(path)
    assert loaded.config == net.config and checkpoint["classes"] == list("0123456789")
    assert all(map(torch.equal, loaded.state_dict().values(), net.state_dict().values()))
    (tmp_path / "half.pt").write_bytes(path.read_bytes()[:5000])
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    for name, line in (("none", "there is no"), ("half", "damaged"), ("foreign", "another kind")):
        with pytest.raises(ValueError, match=line) as error:
            model.load(tmp_path / f"{name}.pt")
        assert "\n" not in str(error.value)
