"""The training of the ResNet-MAE: learns, goes on, in two ranks; and the judge of its features."""

import time

import pytest
import torch
from PIL import Image

import data
import mae
from conftest import fails, python, read, run, torchrun, write_cifar, write_folder

PLAN = ["mae.py", "--size", "16", "--width", "4", "--layers", "1", "1", "1", "1", "--patch", "1"]
PLAN += ["--steps", "6", "--batch", "8", "--device", "cpu"]


def plan_of(folder):
    return [*PLAN, "--dataset", f"folder:{folder}/pets", "--data_dir", str(folder)]


def test_train_mae_goes_on_and_refuses_another_plan(monkeypatch, tmp_path, capsys):
    write_folder(tmp_path / "pets")
    plan = plan_of(tmp_path)
    run(monkeypatch, *plan, "--out", tmp_path / "whole.pt")
    assert "loss of what is hidden" in capsys.readouterr().out
    # three rows of a batch of eight, 16 pixels and a margin, four times as large
    assert Image.open(tmp_path / "whole.png").size == (8 * 72, 3 * 72)

    clock = iter(range(0, 10**6, 40))  # every second look at it is more than a minute later

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    half = [*plan, "--out", tmp_path / "half.pt"]
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(clock))
        patch.setattr(data, "save_grid", stop)  # after the encoder has been written
        with pytest.raises(SystemExit, match="130"):
            run(patch, *half)
    assert 0 < read(tmp_path / "half.pt")["step"] < 6
    assert not list(tmp_path.glob("*.tmp"))
    run(monkeypatch, *half)
    assert "going on after step" in capsys.readouterr().out
    whole, again = read(tmp_path / "whole.pt"), read(tmp_path / "half.pt")
    for name, value in whole["model"].items():
        assert torch.equal(value, again["model"][name]), name
    before = (tmp_path / "half.pt").read_bytes()
    run(monkeypatch, *half)  # it is done
    assert (tmp_path / "half.pt").read_bytes() == before

    def bad(*args):
        return fails(monkeypatch, capsys, *half, *args)

    assert "was trained with lr 0.002: name another file" in bad("--lr", 1)
    assert "was trained with steps 6" in bad("--steps", 7)
    assert (tmp_path / "half.pt").read_bytes() == before
    assert "--steps: must be from 1" in bad("--steps", 0)
    other = ["--out", tmp_path / "other.pt"]
    assert "too small" in bad("--patch", 4, *other)
    assert "none is not to be had" in bad("--device", "none")
    (tmp_path / "half.pt").write_text("hello")
    assert "half.pt is damaged or not a checkpoint of mae.py" in bad()
    assert not (tmp_path / "other.pt").exists()


def test_train_mae_learns_to_fill_in(tmp_path, capsys):
    images, labels, _ = data.load("digits", size=16)
    sampler = data.Sampler(images, labels, "cpu")
    net = mae.train_mae(
        tmp_path / "a.pt",
        sampler,
        10,
        width=8,
        patch=1,
        layers=(1, 1, 1, 1),
        steps=80,
        cls_steps=80,
        batch=64,
    )
    lines = capsys.readouterr().out.splitlines()
    loss = [float(line.split("hidden ")[1].split()[0]) for line in lines]
    right = int(lines[-1].split("classifier ")[1].split("%")[0])
    assert len(lines) == 2 and loss[1] < 0.5 * loss[0] and right > 25, lines
    x = data.to_float(images[:10])
    mask = torch.zeros_like(x)
    mask[..., 4:6, 4:6] = 1
    other = x * (1 - mask) + mask * torch.randn_like(x)
    assert torch.equal(net(x, mask)[0], net(other, mask)[0])  # what is hidden is not seen


def test_the_loss_is_summed_over_channels_and_a_mean_over_locations():
    images, filled = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    mask = mae.draw_mask(2, 8, 2, torch.Generator().manual_seed(0))
    expected = []
    for x, y, m in zip(images, filled, mask, strict=True):
        patches = (x - y).unfold(1, 2, 2).unfold(2, 2, 2)  # [3, 4, 4, 2, 2]: 12 channels officially
        hidden = m[0, ::2, ::2] == 1
        expected.append(patches.square().sum((0, 3, 4))[hidden].mean())
    found = mae.reconstruction(filled, images, mask, 2)
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_the_average_is_saved_and_goes_on(monkeypatch, tmp_path):
    images, labels, _ = data.load("digits", size=16)
    sampler = data.Sampler(images, labels, "cpu")
    plan = dict(width=8, layers=(1, 1, 1, 1), batch=8, lr=1e-2)
    fast = mae.train_mae(tmp_path / "a.pt", sampler, 10, steps=12, ema=0.0, **plan)
    slow = mae.train_mae(tmp_path / "b.pt", sampler, 10, steps=12, ema=1.0, **plan)
    a, b = (torch.cat([p.flatten() for p in net.parameters()]) for net in (fast, slow))
    assert not torch.equal(a, b)  # the same training, of which one saves the last weights
    first, _ = mae.load_mae(tmp_path / "a.pt")
    assert all(map(torch.equal, first.parameters(), fast.parameters()))


@pytest.mark.parametrize("width, groups", [(8, 1), (32, 4), (256, 32), (640, 32)])
def test_groups_have_at_least_eight_channels(width, groups):
    assert mae.group_norm(width, 8).num_groups == groups
    assert mae.group_norm(width, 1).num_groups == min(width, 32)  # officially


def test_masks_hide_half_in_whole_patches():
    mask = mae.draw_mask(500, 18, 2, torch.Generator().manual_seed(0))
    assert mask.shape == (500, 1, 18, 18) and set(mask.unique().tolist()) == {0, 1}
    assert mask.mean().item() == pytest.approx(0.5, abs=0.02)
    cells = mask[..., :16, :16].unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert (cells == cells[..., :1]).all()  # 2 x 2 locations of 2 x 2 pixels
    assert (cells[..., 0].flatten(1).std(1) > 0).all()  # and not the same everywhere


def test_two_ranks_train_one_mae(monkeypatch, tmp_path):
    write_folder(tmp_path / "pets")
    plan = [*plan_of(tmp_path), "--cls_steps", 6, "--out"]
    status, _, err = python(*torchrun(2), *plan, tmp_path / "two.pt")
    assert status == 0, err
    run(monkeypatch, *plan, tmp_path / "one.pt")
    one, two = read(tmp_path / "one.pt"), read(tmp_path / "two.pt")
    torch.manual_seed(0)
    start = mae.MAE(**one["config"]).state_dict()

    def flat(weights):
        return torch.cat([v.flatten() for v in weights.values()])

    moved, apart = flat(one["model"]) - flat(start), flat(two["model"]) - flat(one["model"])
    # Adam turns rounding of tiny gradients into steps
    assert apart.norm() < 0.05 * moved.norm()


def test_features_are_compared_with_pixels(monkeypatch, tmp_path, capsys):
    write_cifar(tmp_path / "cifar-10-batches-py")
    plan = [*PLAN, "--dataset", "cifar10", "--data_dir", tmp_path, "--out", tmp_path / "a.pt"]
    run(monkeypatch, *plan)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("20 nearest neighbours: pooled features ")
    assert 0 <= float(line.split()[-1]) <= 1


def test_knn_accuracy():
    labels = torch.arange(300) % 5
    a = torch.randn(300, 5) + 4 * torch.eye(5)[labels]
    assert mae.knn_accuracy(a, labels, a + 0.1, labels) > 0.95
    assert mae.knn_accuracy(a, labels[torch.randperm(300)], a + 0.1, labels) < 0.4
