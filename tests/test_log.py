"""The log of a run: its lines and its picture; resumed, of another run, on a full disk; wandb."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import features
import log
import mae
import train as training
from conftest import QUICK, fails, needs, python, read, run, save_mae, train

STEP = {"step", "images", "seconds"}
TOLD = {"drift_0.02", "drift_0.05", "drift_0.2", "scale", "grad_norm", "lr"}
SPEED = {"images_per_s", "memory_gb"}
SCORES = {"fd", "acc", "std", "copies"}


def lines_of(path):
    """Every line, by a strict reader."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def told(lines):
    return [line for line in lines if "grad_norm" in line]


def test_lines(tmp_path, capsys):
    plan = [*QUICK, "--log_every", 3, "--eval_every", 4, "--steps", 7, "--warmup", 4]
    train(*plan, "--out", tmp_path / "a.pt")
    printed = capsys.readouterr().out
    first, real, *rest = lines_of(tmp_path / "a.jsonl")
    known = dict(dataset="digits", steps=7, device="cpu", torch=torch.__version__)
    assert known.items() <= first.items() and "--warmup 4" in first["command"]
    assert "commit" in first
    names = {name for name in TOLD if name.startswith(("drift", "scale"))}
    assert set(real) == {"step"} | {f"real_{name}" for name in SCORES | names}
    assert [line["step"] for line in told(rest)] == [1, 3, 4, 6, 7]  # the first, and the last
    args, _ = training.parse([str(a) for a in plan])
    for line in told(rest):
        assert set(line) == STEP | TOLD | SPEED
        assert f"{line['step']:6d}  drift 0.02:{line['drift_0.02']:.2e}" in printed
        assert line["images"] == 80 * line["step"] and line["images_per_s"] > 0
        rate = args.lr * training.schedule(line["step"] - 1, args)
        assert line["lr"] == pytest.approx(rate, rel=1e-5)
    judged = [line for line in rest if "fd" in line]
    assert [line["step"] for line in judged] == [4, 7] and len(rest) == 7
    for line in judged:
        assert set(line) == STEP | SCORES
        assert f"fd {line['fd']:.3f}  nearest-neighbour accuracy {line['acc']:.3f}" in printed
    seconds = [line["seconds"] for line in rest]
    assert seconds == sorted(seconds)


def test_lines_of_several_encoders(tmp_path):
    file = str(save_mae(mae.MAE(1, 16, 4, layers=(1, 1, 1, 1)), tmp_path / "one.pt"))
    train(*QUICK, "--steps", 2, "--size", 16, "--encoder", file, "--out", tmp_path / "a.pt")
    others = len(features.Encoder(file, 1, 16)(torch.zeros(1, 1, 16, 16))) - 1
    for line in told(lines_of(tmp_path / "a.jsonl")):
        for name in ("drift_0.2", "scale"):  # each feature counts the same
            mean = (line[f"pixels.{name}"] + others * line[f"{file}.{name}"]) / (1 + others)
            assert line[name] == pytest.approx(mean, rel=1e-4)
            assert line[f"pixels.{name}"] != line[f"{file}.{name}"]


def test_a_number_that_is_not_finite_leaves_the_log_readable(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "peak_memory", lambda device: float("nan"))
    train(*QUICK, "--steps", 1, "--out", tmp_path / "a.pt")
    assert [line["memory_gb"] for line in told(lines_of(tmp_path / "a.jsonl"))] == [None]


# Resumed


def test_a_killed_run_logs_every_step_once(tmp_path):
    """What it had logged after its checkpoint, a torn line at the end too, is done again."""
    plan = [*QUICK, "--steps", 6, "--eval_every", 2]
    train(*plan, "--out", tmp_path / "whole.pt")
    train(*plan, "--out", tmp_path / "killed.pt", "--stop_after", 3)
    killed = tmp_path / "killed.jsonl"
    before = lines_of(killed)
    with open(killed, "a") as file:
        file.write('{"step": 4, "images": 320, "grad_norm": 7.5}\n{"step": 5, "ima')
    train("--resume", "auto", "--out", tmp_path / "killed.pt")
    whole, again = lines_of(tmp_path / "whole.jsonl"), lines_of(killed)
    assert again[: len(before)] == before
    assert [line["step"] for line in told(again)] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(told(whole), told(again), strict=True):
        assert {name: a[name] for name in TOLD} == {name: b[name] for name in TOLD}
    assert {name: whole[-1][name] for name in SCORES} == {name: again[-1][name] for name in SCORES}
    seconds = [line["seconds"] for line in again if "seconds" in line]
    assert seconds == sorted(seconds)


def test_the_log_of_another_run_is_left_alone(monkeypatch, tmp_path, capsys):
    a, file = tmp_path / "a.pt", tmp_path / "a.jsonl"
    train(*QUICK, "--steps", 1, "--out", a)
    checkpoint, lines = a.read_bytes(), file.read_text()

    def bad(*args):
        before = file.read_bytes()
        line = fails(monkeypatch, capsys, "train.py", *QUICK, "--out", a, *args)
        assert a.read_bytes() == checkpoint and file.read_bytes() == before
        assert "a.jsonl" in line
        return line

    assert "of another run, with steps 1, not 600: name another --out" in bad()
    assert "with lr 0.003, not 1.0" in bad("--steps", 1, "--lr", 1)
    assert "with seed 0, not 5" in bad("--resume", a, "--seed", 5)
    file.write_text(lines.replace('"dataset": "digits"', '"dataset": "mnist"'))
    assert "with dataset mnist, not digits" in bad("--resume", a)
    for text in ("", "hello\n", "[1]\n", "[" * 10**5, '{"a": 1}\n', lines[:50]):
        file.write_text(text)
        for how in ([], ["--resume", "auto"]):
            assert "is no log of train.py" in bad(*how)
    file.unlink()
    file.mkdir()
    fails(monkeypatch, capsys, "train.py", *QUICK, "--out", a)
    file.rmdir()
    train("--resume", a, "--steps", 2)  # without a log, a new one
    assert [line["step"] for line in told(lines_of(file))] == [2]


def test_a_run_without_a_step_does_not_bar_the_next(monkeypatch, tmp_path, capsys):
    """The advice of an error can be followed under the same name."""
    out = ["--out", tmp_path / "a.pt"]
    fails(monkeypatch, capsys, "train.py", *QUICK, *out, "--encoder", "none.pt")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="give --micro_batch"):
        patch.setattr(training, "gradient", lambda *args: torch.empty(2**60))
        train(*QUICK, *out)
    train(*QUICK, *out, "--micro_batch", 40, "--steps", 1)
    assert lines_of(tmp_path / "a.jsonl")[0]["micro_batch"] == 40


@pytest.mark.parametrize("name", ["a.jsonl", "a.png", "samples.pt"])
def test_a_checkpoint_has_not_the_name_of_what_is_beside_it(monkeypatch, tmp_path, capsys, name):
    command = ["train.py", *QUICK, "--steps", 1, "--out", tmp_path / name]
    assert name in fails(monkeypatch, capsys, *command)
    assert not list(tmp_path.iterdir())


def test_a_log_that_is_taken_away_does_not_end_the_run(monkeypatch, tmp_path):
    update = training.update

    def taken(step, *args):
        (tmp_path / "a.jsonl").unlink(missing_ok=True)
        return update(step, *args)

    monkeypatch.setattr(training, "update", taken)
    monkeypatch.setattr(training, "N_EVAL", 20)
    plan = [*QUICK, "--steps", 2, "--eval_every", 1, "--out", tmp_path / "a.pt"]
    training.main([str(a) for a in plan])
    assert read(tmp_path / "a.pt")["step"] == 2


FULL = """
import os, resource, sys
import train
first, last, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
update, train.N_EVAL = train.update, 20
def full(step, *args):
    room = resource.RLIM_INFINITY
    if first <= step + 1 <= last:
        room = os.path.getsize(path) + 100  # of some 300
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    return update(step, *args)
train.update = full
train.main(sys.argv[4:])
"""


def test_full_disk(tmp_path):
    """Lines for which there was no room are missing as a whole; the picture is not half one."""
    pytest.importorskip("resource")
    file, plan = tmp_path / "a.jsonl", [*QUICK, "--steps", 8, "--eval_every", 4]
    status, _, err = python("-c", FULL, 3, 5, file, *plan, "--out", tmp_path / "a.pt")
    assert status == 0 and "Traceback" not in err
    assert err.count(f"cannot write {file} ") == 4  # three steps, and the scores of one
    assert [line["step"] for line in told(lines_of(file))] == [1, 2, 6, 7, 8]
    assert read(tmp_path / "a.pt")["step"] == 8 and not list(tmp_path.glob("*.tmp"))


# The picture


def curves(figure):
    """{title: {label: points}} of a figure, and {title: heights of the dashed lines}."""
    solid, dashed = {}, {}
    for axes in figure.axes:
        lines = {line: line.get_linestyle() == "--" for line in axes.lines}
        solid[axes.get_title()] = {
            line.get_label(): line.get_xydata().tolist() for line, real in lines.items() if not real
        }
        dashed[axes.get_title()] = [line.get_ydata()[0] for line, real in lines.items() if real]
    return solid, dashed


def test_picture(monkeypatch, tmp_path):
    needs("matplotlib")
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig

    def watched(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", watched)
    monkeypatch.setattr(training, "N_EVAL", 20)
    plan = [*QUICK, "--steps", 4, "--eval_every", 2, "--out", tmp_path / "b.pt"]
    training.main([str(a) for a in plan])
    assert len(figures) == 2  # one at each evaluation
    assert Image.open(tmp_path / "b.png").size == (1200, 600)
    lines = lines_of(tmp_path / "b.jsonl")
    solid, dashed = curves(figures[-1])
    drifts = solid["mean square of the raw drift"]
    assert set(drifts) == {"drift_0.02", "drift_0.05", "drift_0.2"}
    assert drifts["drift_0.2"] == [[x["images"], x["drift_0.2"]] for x in told(lines)]
    fd = [[x["images"], x["fd"]] for x in lines if "fd" in x]
    assert solid["Frechet distance"] == {"fd": fd} and len(fd) == 2
    assert dashed["Frechet distance"] == [lines[1]["real_fd"]]
    assert dashed["mean square of the raw drift"] == [lines[1][f"real_{name}"] for name in drifts]

    monkeypatch.chdir(tmp_path)
    shutil.copy("b.jsonl", "a.jsonl")
    run(monkeypatch, "log.py", "a.jsonl", "b.jsonl")
    assert Image.open("log.png").size == (1200, 600)
    both = curves(figures[-1])[0]["Frechet distance"]
    assert set(both) == {"a.jsonl fd", "b.jsonl fd"} and both["b.jsonl fd"] == fd


def test_no_matplotlib_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(log, "find_spec", lambda name: None)
    plan = [*QUICK, "--steps", 1, "--out", tmp_path / "a.pt"]
    training.main([str(a) for a in plan])
    assert f"no {tmp_path}/a.png: pip install matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "a.png").exists() and read(tmp_path / "a.pt")["step"] == 1


def test_bad_input_of_the_script(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def bad(*args):
        return fails(monkeypatch, capsys, "log.py", *args)

    assert "required: logs" in bad()
    assert "there is no log none.jsonl" in bad("none.jsonl")
    (tmp_path / "a.pt").write_bytes(b"\x80\x02hello")
    if log.find_spec("matplotlib"):
        assert "a.pt is no log of train.py" in bad("a.pt")
        odd = '{"torch": 1}\n{"fd": 2, "real_fd": null}\n{"images": 1, "fd": null}\n'
        (tmp_path / "odd.jsonl").write_text(odd)
        run(monkeypatch, "log.py", "odd.jsonl")  # nothing to draw


# Weights & Biases


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: what it was told."""
    sent = SimpleNamespace(runs=[], lines=[])

    def init(**kwargs):
        sent.runs.append(kwargs)
        return SimpleNamespace(log=lambda numbers, step: sent.lines.append((step, dict(numbers))))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return sent


def test_wandb_gets_the_same_and_goes_on_in_the_same_run(tmp_path, wandb):
    plan = [*QUICK, "--steps", 4, "--wandb", "digits", "--out", tmp_path / "a.pt"]
    train(*plan, "--stop_after", 2)
    train("--resume", tmp_path / "a.pt")
    first, *lines = lines_of(tmp_path / "a.jsonl")
    assert wandb.lines == [(line["step"], line) for line in lines]
    assert [line["step"] for line in told(lines)] == [1, 2, 3, 4]
    one, two = wandb.runs
    assert one["project"] == "digits" and one["config"] == first
    assert one["id"] == two["id"] == first["run"] and two["resume"] == "allow"
    train(*QUICK, "--steps", 1, "--wandb", "digits", "--out", tmp_path / "b.pt")
    assert wandb.runs[-1]["id"] != first["run"]


def test_no_wandb_is_one_line(monkeypatch, tmp_path, capsys):
    def bad():
        command = ["train.py", *QUICK, "--wandb", "digits", "--out", tmp_path / "a.pt"]
        line = fails(monkeypatch, capsys, *command)
        assert not list(tmp_path.iterdir())
        return line

    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in bad()

    def init(**kwargs):
        raise RuntimeError("no key:\nwandb login")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    assert "--wandb digits: RuntimeError: no key: wandb login" in bad()
