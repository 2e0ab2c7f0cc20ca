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

import config
import drift
import mae
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
    args, typed, _ = config.parse(["--dataset", "cifar10", "--patch", "4", "--no-flip"])
    assert (args.model, args.patch, args.flip, args.labels) == ("tiny", 4, False, 4)
    assert set(typed) == {"dataset", "patch", "flip"}
    for device, size in (("cpu", 32), ("cuda", 64)):
        assert config.parse(["--dataset", "folder:a/b", "--device", device])[0].size == size


@pytest.mark.parametrize("dataset", ["cifar10", "folder:some/where", "npz:some.npz"])
def test_photographs_have_a_preset_for_each_machine(dataset):
    cpu, gpu = (config.parse(["--dataset", dataset, "--device", d])[0] for d in ("cpu", "cuda:1"))
    assert (cpu.model, cpu.labels, cpu.n_gen, cpu.n_pos) == ("tiny", 4, 80, 160)
    assert (gpu.model, gpu.labels, gpu.n_gen, gpu.n_pos) == ("S", 5, 128, 256)
    assert cpu.muon == gpu.muon == 0.02 and cpu.encoder == gpu.encoder == ["auto"]
    assert not cpu.noise_image and not gpu.noise_image
    for size, patch in ((32, 2), (64, 4), (28, 2), (100, 10), (8, 1)):
        assert config.adapt(gpu, {}, (3, size, size), 10, 1).patch == patch


@pytest.mark.parametrize("installed", [True, False])
def test_the_space_of_the_drift_by_default(monkeypatch, installed):
    monkeypatch.setattr(config, "find_spec", lambda name: installed or None)
    args, _, _ = config.parse(["--dataset", "npz:some.npz"])
    network = "timm:mobilenetv2_100@{}" if installed else "mae"
    for size, larger in ((32, 96), (128, 128)):
        found = config.adapt(args, {}, (3, size, size), 9, 1).encoder
        assert found == ["pixels", "pool:2", "pool:4", network.format(larger)]
    assert config.adapt(args, {}, (1, 30, 30), 9, 1).encoder == ["pixels", "pool:2", "mae"]
    assert args.encoder == ["auto"]  # adapt() changes a copy


def test_a_device_stays_what_was_typed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: device.index + 0)  # it needs one
    found = {"cuda": "cuda:0", "cuda:1": "cuda:1", "cuda:3": "cuda:3"}  # as a GPU's tensors say
    monkeypatch.setattr(train.model, "usable", lambda device: torch.device(found[device]))
    assert train.setup("cuda")[2] == torch.device("cuda:0")
    assert train.setup("cuda:1")[2] == torch.device("cuda:1")
    monkeypatch.setattr(train.dist, "init_process_group", lambda **how: None)
    for name, value in dict(RANK=3, WORLD_SIZE=4, LOCAL_RANK=3).items():
        monkeypatch.setenv(name, str(value))
    assert train.setup("cuda") == (3, 4, torch.device("cuda:3"))


def test_a_rank_keeps_its_own_part_only(monkeypatch):
    noise = torch.randn(8, 5)
    assert train.share(noise) is noise
    for name, value in dict(is_initialized=True, get_world_size=4, get_rank=1).items():
        monkeypatch.setattr(train.dist, name, lambda value=value: value)
    part = train.share(noise)
    assert torch.equal(part, noise[2:4]) and part.untyped_storage().nbytes() == 2 * 5 * 4


def test_alpha_has_the_stated_density():
    for k in (0, 1, 3):
        alpha = drift.draw_alpha(40000, 4.0, k, 0.25, torch.Generator().manual_seed(0))
        assert (alpha == 1).float().mean().item() == pytest.approx(0.25, abs=0.01)
        above = alpha[alpha != 1].double()
        grid = torch.linspace(1, 4, 100001, dtype=torch.float64)
        density = grid**-k / (grid**-k).sum()
        assert above.mean().item() == pytest.approx((grid * density).sum().item(), rel=0.01)


def test_rates():
    args, *_ = config.parse(["--steps", "100", "--warmup", "10", "--decay", "0.5"])
    rates = [train.rate(step, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:51] == [1] * 42
    assert rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)


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
    assert config.parse(["--resume", "out.pt"])[0].device == config.Settings.device
    os.rename("a", "b")
    state, lines = run("--resume", "out.pt", "--stop_after", 2, "--dataset", "folder:b/pets")
    assert state["step"] == 2 and state["args"]["ema"] == config.Settings.ema
    assert [line["step"] for line in lines if "drift_0.2" in line] == [1, 2]


def test_resume_auto_starts_or_goes_on_and_a_new_run_replaces_the_old(capsys):
    auto = [*QUICK, "--resume", "auto"]
    assert run(*auto, "--steps", 1)[0]["step"] == 1
    assert run(*auto, "--steps", 2)[0]["step"] == 2
    _, lines = run(*QUICK, "--steps", 1)
    assert "of an earlier run" in capsys.readouterr().out and lines[-1]["step"] == 1


def test_one_class_is_no_label(tmp_path):
    write_folder(tmp_path / "pets", 3)
    plan = ["--steps", 1, "--encoder", "pixels", "--size", 8, "--patch", 4, "--n_pos", 5]
    for data, name in ((["folder:pets/cats"], "cats"), (["folder:pets", "--unconditional"], "all")):
        state, _ = run(*QUICK, "--dataset", *data, *plan)
        args = state["args"]
        assert (args["labels"], args["n_unc"], args["alpha_max"]) == (1, 0, 1.0)
        assert state["classes"] == [name] and (args["n_gen"], args["n_pos"]) == (4, 5)
    args, typed, _ = config.parse(["--n_gen", "16"])
    args = config.adapt(args, typed, (1, 8, 8), 1, 2)
    assert (args.labels, args.n_gen, args.n_pos) == (2, 16, 1280)


@pytest.mark.parametrize("rates", [["--lr", 1e30], ["--lr", 1e4, "--muon", 50]])
def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(rates):
    state, _ = run(*QUICK, "--steps", 2)
    line = refusal(train.main, "--resume", "out.pt", "--steps", 60, "--decay", 0, *rates)
    assert "weights are not finite" in line
    kept = torch.load("out.pt", weights_only=True)
    assert all(torch.equal(kept["model"][k], v) for k, v in state["model"].items())


def test_a_full_disk_leaves_the_last_checkpoint(monkeypatch):
    run(*QUICK, "--steps", 1)
    before, error = Path("out.pt").read_bytes(), RuntimeError("unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=error))
    line = refusal(train.main, "--resume", "out.pt", "--steps", 2)
    assert "unexpected pos" in line and "out.pt is as it was" in line
    assert Path("out.pt").read_bytes() == before


def test_what_cannot_be_written_is_refused_before_the_first_step(monkeypatch):
    for out in ("lr0.001", "model.png", "runs/"):
        assert "must end in .pt" in refusal(train.main, *QUICK, "--out", out)
    monkeypatch.setattr(train.data, "load", mock.Mock(side_effect=KeyboardInterrupt))
    assert "stopped before the first step" in refusal(train.main, *QUICK)


def test_nan_in_the_log_is_null():
    train.log("out.pt", dict(fd=float("nan"), acc=0.5))
    assert json.loads(Path("out.jsonl").read_text()) == dict(fd=None, acc=0.5)


def test_the_average_of_the_weights_forgets_the_first_ones():
    state, _ = run(*QUICK, "--steps", 8, "--ema", 0.999)
    first = train.build_net(config.Settings(), {}, (1, 8, 8), range(10), None).state_dict()
    for name in ("final_proj.weight", "blocks.2.mlp.w2.weight"):
        way, averaged = state["model"][name] - first[name], state["ema"][name] - first[name]
        assert averaged.norm() > 0.5 * way.norm()  # by 0.999 alone: 0.004


def test_scores_of_samples_and_of_real_images_are_of_equal_numbers(monkeypatch):
    monkeypatch.setattr(train, "N_EVAL", 1000)
    with mock.patch("train.fid.scores", wraps=train.fid.scores) as scores:
        run(*QUICK, "--steps", 1)
    (real, _, rest, _), (samples, _, others, _) = (call.args for call in scores.call_args_list)
    assert len(real) == len(samples) == 898 and len(rest) == len(others) == 899


def test_signal_handlers_are_given_back():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with train.stop_signals() as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert stop
    assert [signal.getsignal(number) for number in numbers] == before


def test_the_size_of_a_step_and_the_end_are_said(capsys):
    _, lines = run(*QUICK, "--steps", 11, "--n_pos", 100, "--log_every", 100)
    assert "M parameters; a step: 40 samples, 1,080 real images" in capsys.readouterr().out
    assert [line["step"] for line in lines if "minutes_left" in line] == [1, 10, 11]


def test_the_checkpoint_names_the_encoder_that_was_trained(monkeypatch):
    def write(sampler, classes, path, **how):
        net = mae.MAE(1, 8, 8, 1, (1, 1, 1, 1))
        torch.save(dict(config=net.config, model=net.state_dict()), path)

    monkeypatch.setattr(mae, "train", write)
    state, _ = run(*QUICK, "--encoder", "pixels", "mae", "--data_dir", ".", "--steps", 1)
    [file] = Path().glob("mae-*.pt")
    assert state["args"]["encoder"] == ["pixels", str(file)]
    file.rename("kept.pt")  # on another device, of other data: it is not trained anew
    assert f"no checkpoint {file}" in refusal(train.main, "--resume", "out.pt", "--steps", 2)


def test_fine_tuning_keeps_the_classes_that_it_knows():
    net = tiny_generator()
    save_generator(net, "given.pt", [str(i) for i in range(10)])
    np.savez("two.npz", arr_0=np.zeros((20, 8, 8, 1), np.uint8), labels=np.arange(20) % 2 * 9 + 7)
    plan = [*QUICK, "--dataset", "npz:two.npz", "--encoder", "pixels", "--init", "given.pt"]
    state, _ = run(*plan, "--steps", 1, "--lr", 0)
    assert torch.equal(state["model"]["blocks.0.attn.qkv.weight"], net.blocks[0].attn.qkv.weight)
    table = net.label_embed.weight
    expected = torch.stack([table.mean(0), table[7]])  # of classes 16 and 7, in the order of names
    torch.testing.assert_close(state["model"]["label_embed.weight"], expected.flip(0))
    assert "mismatch for pos_embed" in refusal(train.main, *plan, "--size", 16)


def test_without_a_compiler_a_run_goes_on(monkeypatch, capsys):
    error = RuntimeError("no C++ compiler\nand many more lines")
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=error))
    run(*QUICK, "--compile", "--steps", 1)
    assert "not compiled, so that a step takes longer: 'no C++ compiler" in capsys.readouterr().out


def test_an_error_of_the_code_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(train, "build_net", mock.Mock(side_effect=RuntimeError("of a fork")))
    with pytest.raises(RuntimeError, match="of a fork"):
        run(*QUICK, "--steps", 1)


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


def test_labels_follow_the_ranks():
    args, typed, _ = config.parse([])
    assert config.adapt(args, typed, (1, 8, 8), 10, 4).labels == 12
    args, typed, _ = config.parse(["--labels", "10"])
    with pytest.raises(ValueError, match="no multiple of 4 ranks"):
        config.adapt(args, typed, (1, 8, 8), 10, 4)
