"""What bench.py says of times, on problems so small that it takes none."""

import json
from types import SimpleNamespace

import pytest
import torch

import bench
from conftest import fails, run
from model import DiT, DiTConfig

SMALL = ["--model", "tiny", "--size", "16", "--patch", "4", "--labels", "2", "--n_gen", "4"]
SMALL += ["--n_pos", "4", "--n_unc", "2", "--steps", "1", "--device", "cpu"]


def test_bench_says_where_the_time_goes(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "bench.py", "step", "sampling", *SMALL, "--json", tmp_path / "a.json")
    out = capsys.readouterr().out
    assert "2 x (4 generated, 4 positive, 2 unconditional)" in out and "images/s" in out
    result = json.loads((tmp_path / "a.json").read_text())
    step, sampling = result["step"], result["sampling"]
    assert list(step["pieces"]) == ["generator", "encoder", "drift", "optimiser"]
    assert sum(step["pieces"].values()) == pytest.approx(step["seconds"])
    net = DiT(DiTConfig.named("tiny", input_size=16, patch_size=4))
    matrices = 0
    for name, module in net.blocks.named_modules():
        if isinstance(module, torch.nn.Linear) and "adaln" not in name:
            matrices += module.weight.numel()
    # 8 images of 20 tokens, forward and backward
    assert step["flop"]["generator"] == pytest.approx(6 * 8 * 20 * matrices, rel=0.2)
    assert step["flop"]["encoder"] > 0 and step["flop"]["drift"] > 0
    assert sampling["batch"] == 16 and sampling["images_per_s"] > 10


def test_bench_of_the_drift(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "SHAPES", [(2, 4, 4, 2, 8), (1, 8, 8, 0, 8)])
    monkeypatch.setattr(torch, "compile", lambda f: f)
    [one, two] = bench.bench_drift(SimpleNamespace(device=torch.device("cpu")))
    assert one["shape"] == (2, 4, 4, 2, 8) and two["products_ms"] > 0
    assert one["eager_ms"] > one["products_ms"]  # they are a part of it
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4 and lines[-1].endswith("x")


def test_bench_scaling(monkeypatch, capsys):
    monkeypatch.setattr(bench, "milliseconds", lambda f, device, repeat=10: f() or 1.0)
    monkeypatch.setattr(bench.DriftCost, "loss", lambda self: None)
    rows = bench.bench_scaling(SimpleNamespace(device=torch.device("cpu")))
    assert {"groups", "N", "ms"} == set(rows[0]) and len(rows) == 7
    assert "1024 groups of    64:" in capsys.readouterr().out


def test_bench_bad_input(monkeypatch, capsys):
    assert "there are drift, scaling" in fails(monkeypatch, capsys, "bench.py", "steps")
    assert "invalid choice: 'XL'" in fails(monkeypatch, capsys, "bench.py", "--model", "XL")
