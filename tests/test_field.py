"""The drift, beyond what test_drift.py proves: large problems, odd ones, the demo."""

import torch
from PIL import Image

import drift
from conftest import loss_and_grad, problem, relative, run


def test_a_problem_that_is_cut_gives_what_it_gives_whole():
    """7 groups, 2,500 times over: the field is computed for some groups at a time, and that is no
    multiple of 7. Loss and stats are those of the 7, every gradient is 1 / 2,500 of theirs."""
    times = 2500
    args = problem(G=7)
    numbers = len(drift.TAUS) * args[0].shape[1] * sum(y.shape[1] for y in args[:3])
    groups = 2**21 // numbers  # that are computed at a time
    assert groups % 7 and 2 * groups < 7 * times
    loss, grad, stats = loss_and_grad(*args)
    repeated = [torch.cat([t] * times) for t in args]
    many, many_grad, many_stats = loss_and_grad(*repeated)
    assert relative(many, loss) < 1e-12
    assert relative(many_grad * times, grad.repeat(times, 1, 1)) < 1e-12
    for key in stats:
        torch.testing.assert_close(many_stats[key], stats[key])


def test_a_group_of_one_sample_is_finite():
    loss, grad, _ = loss_and_grad(torch.randn(2, 1, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    assert loss.isfinite() and grad.isfinite().all()


def test_equal_samples_and_data_are_finite():
    """No distance at all: a normalisation by it, or by the field, would be 0 / 0."""
    x = torch.ones(2, 4, 3)
    loss, grad, _ = loss_and_grad(x, x)
    assert loss.isfinite() and grad.isfinite().all()


def test_the_demo_draws(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "drift.py", "--steps", 20, "--out", tmp_path / "a.gif")
    assert Image.open(tmp_path / "a.gif").n_frames > 10
    assert "checkerboard" in capsys.readouterr().out


def test_the_demo_learns(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "drift.py", "--steps", 300, "--out", tmp_path / "a.gif")
    out = capsys.readouterr().out.splitlines()[:2]
    ratios = [float(line.split("ratio ")[1].split(",")[0]) for line in out]
    print("\ndistance to the data, in that of two samples of it:", *ratios, end="")
    assert max(ratios) < 5
