"""The trainer: settings, guidance, rates, resuming, signals, odd data."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import features
import train
from conftest import HERE, refusal, save_generator, start, tiny_generator, write_folder

QUICK = ["--device", "cpu", "--n_gen", "4", "--log_every", "1", "--muon", "0"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def run(*args):
    """Trains; -> the checkpoint and the lines of the log."""
    train.main([*map(str, args), "--device", "cpu"])
    out = str(args[args.index("--out") + 1]) if "--out" in args else "out.pt"
    lines = Path(out).with_suffix(".jsonl").read_text().splitlines()
    return torch.load(out, weights_only=True), [json.loads(line) for line in lines]


def test_what_is_typed_overrides_the_preset():
    args, typed, _ = train.parse(["--dataset", "cifar10", "--patch", "4", "--no-flip"])
    assert (args.model, args.patch, args.flip, args.labels) == ("S", 4, False, 5)
    assert set(typed) == {"dataset", "patch", "flip"}
    assert train.parse(["--dataset", "folder:some/where"])[0].size == 64


def test_alpha_has_the_stated_density():
    for k in (0, 3):
        args, *_ = train.parse(["--alpha_k", str(k), "--alpha_one", "0.25"])
        alpha = train.draw_alpha(40000, args, torch.Generator().manual_seed(0))
        assert (alpha == 1).float().mean().item() == pytest.approx(0.25, abs=0.01)
        above = alpha[alpha != 1].double()
        grid = torch.linspace(1, 4, 100001, dtype=torch.float64)
        density = grid**-k / (grid**-k).sum()
        assert above.mean().item() == pytest.approx((grid * density).sum().item(), rel=0.01)


def test_the_encoder_never_gets_an_empty_batch(monkeypatch):
    """Without guidance there are no unconditional images, and CUDA cannot resize none."""
    forward = features.Encoder.forward

    def checked(self, images):
        assert len(images) > 0
        return forward(self, images)

    monkeypatch.setattr(features.Encoder, "forward", checked)
    run("--n_unc", 0, "--steps", 1, *QUICK)


def test_rates():
    args, *_ = train.parse(["--steps", "100", "--warmup", "10", "--decay", "0.5"])
    rates = [train.rate(step, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:51] == [1] * 42
    assert rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)


def test_no_class_comes_twice_before_each_came_once():
    label = train.draw_labels(25, 10, torch.Generator())
    assert label[:10].unique().numel() == label[10:20].unique().numel() == 10 and len(label) == 25


def test_typed_settings_are_used_at_resume():
    """Those of the optimisers and of the average too, of which the file has a state."""
    run(*QUICK, "--steps", 4, "--stop_after", 2)
    torch.save(torch.load("out.pt", weights_only=True), "copy.pt")
    plain, _ = run("--resume", "out.pt", "--stop_after", 3)
    for name, value in dict(wd=50, lr=1e-1, ema=0.1, warmup=1, muon=0.02, seed=5).items():
        resume = ["--resume", "copy.pt", "--out", "b.pt", "--stop_after", 3]
        typed, _ = run(*resume, f"--{name}", value)
        assert typed["args"][name] == value
        part = "ema" if name == "ema" else "model"
        pairs = zip(plain[part].values(), typed[part].values(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs), name
    assert "size mismatch" in refusal(train.main, "--resume", "out.pt", "--patch", 2)
    other = refusal(train.main, "--resume", "out.pt", "--unconditional")
    assert "mismatch for label_embed" in other


def test_resume_of_an_older_versions_file_on_another_device_and_of_moved_data():
    write_folder(Path("a/pets"))
    plan = [*QUICK, "--dataset", "folder:a/pets", "--size", 8, "--encoder", "pixels", "--patch", 4]
    state, _ = run(*plan, "--steps", 3, "--stop_after", 1)
    del state["args"]["ema"]
    state["args"] |= dict(of_another_version=1, device="elsewhere")
    torch.save(state, "out.pt")
    assert train.parse(["--resume", "out.pt"])[0].device == train.Settings.device
    os.rename("a", "b")
    state, lines = run("--resume", "out.pt", "--stop_after", 2, "--dataset", "folder:b/pets")
    assert state["step"] == 2 and state["args"]["ema"] == train.Settings.ema
    assert [line["step"] for line in lines if "drift_0.2" in line] == [1, 2]


def test_resume_auto_starts_or_goes_on_and_a_new_run_replaces_the_old(capsys):
    auto = [*QUICK, "--resume", "auto"]
    assert run(*auto, "--steps", 1)[0]["step"] == 1
    assert run(*auto, "--steps", 2)[0]["step"] == 2
    _, lines = run(*QUICK, "--steps", 1)
    assert "of an earlier run" in capsys.readouterr().out and lines[-1]["step"] == 1


def test_one_class_is_no_label_and_few_images_lower_the_default(tmp_path, capsys):
    write_folder(tmp_path / "pets", 3)
    common = ["--steps", 1, "--encoder", "pixels", "--size", 8, "--patch", 4]
    for data in (["folder:pets/cats"], ["folder:pets", "--unconditional"]):
        state, _ = run(*QUICK, "--dataset", *data, *common)
        args = state["args"]
        assert (args["labels"], args["n_unc"], args["alpha_max"]) == (1, 0, 1.0)
        assert state["classes"] == ["all"] and args["n_gen"] == 4
    few = "class cats has 3 images"
    assert run(*QUICK, "--dataset", "folder:pets", *common)[0]["args"]["n_pos"] == 3
    assert few in capsys.readouterr().out
    assert few in refusal(train.main, *QUICK, "--dataset", "folder:pets", *common, "--n_pos", 4)


def test_a_gradient_that_is_not_finite_is_left_out(monkeypatch):
    monkeypatch.setattr(train, "clip_grad_norm_", lambda params, most: torch.tensor(float("nan")))
    state, _ = run(*QUICK, "--steps", 2)
    first, _ = run(*QUICK, "--steps", 1)
    assert all(torch.equal(state["model"][k], v) for k, v in first["model"].items())


def test_fine_tuning_takes_weights_and_gets_a_class_table():
    net = tiny_generator()
    save_generator(net, "given.pt", [str(i) for i in range(10)])
    np.savez("two.npz", arr_0=np.zeros((20, 8, 8, 1), np.uint8), labels=np.arange(20) % 2)
    plan = [*QUICK, "--dataset", "npz:two.npz", "--encoder", "pixels", "--init", "given.pt"]
    state, _ = run(*plan, "--steps", 1, "--lr", 0)
    assert torch.equal(state["model"]["blocks.0.attn.qkv.weight"], net.blocks[0].attn.qkv.weight)
    mean = net.label_embed.weight.mean(0)
    torch.testing.assert_close(state["model"]["label_embed.weight"], mean.repeat(2, 1))
    assert "mismatch for pos_embed" in refusal(train.main, *plan, "--size", 16)


def test_without_a_compiler_there_is_one_line(monkeypatch):
    error = RuntimeError("no C++ compiler\nand many more lines")
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=error))
    assert "--no-compile" in refusal(train.main, *QUICK, "--compile", "--steps", 1)


def test_torchrun_stops_with_a_checkpoint_of_both_ranks(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, HERE / "train.py", *QUICK, "--steps", 100000]
    with start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        log = tmp_path / "out.jsonl"
        while not log.exists() or '"step": 3' not in log.read_text():
            time.sleep(0.2)
        job.send_signal(signal.SIGTERM)
        job.wait(100)
    assert torch.load("out.pt", weights_only=True)["step"] >= 3


def test_labels_follow_the_ranks(monkeypatch):
    monkeypatch.setattr(train.dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    args, *_ = train.prepare(["--device", "cpu"], 0, 4)
    assert args.labels == 12
    with pytest.raises(ValueError, match="no multiple of 4 ranks"):
        train.prepare(["--device", "cpu", "--labels", "10"], 0, 4)
