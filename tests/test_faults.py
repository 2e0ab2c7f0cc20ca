"""What can go wrong: kills, full disks, killed ranks, no memory, NaN, damaged files, odd flags."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import fid
import hub
import log
import mae
import sample
import train as training
from conftest import (
    HERE,
    QUICK,
    alone,
    fails,
    needs,
    python,
    read,
    torchrun,
    weights,
    write_cifar,
    write_folder,
    write_idx,
)
from model import DiT, DiTConfig

# Kills

KILLER = """
import io, os, random, signal, sys, time
from pathlib import Path
import torch
import model, train

folder, plan = Path(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)
train.N_EVAL, train.Log.draw = 20, lambda log: None
save, rng, kills, writing, step, fast = torch.save, random.Random(0), 0, 0, 0, False

def slow(state, file):
    buffer = io.BytesIO()
    save(state, buffer)
    raw = buffer.getvalue()
    for i in range(0, len(raw), len(raw) // 20 + 1):
        file.write(raw[i : i + len(raw) // 20 + 1])
        file.flush()
        fast or time.sleep(0.01)

def child(out):
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, open(read)
    os.dup2(write, 1)
    try:
        train.main(["--resume", "auto", "--out", str(out), *plan])
        os._exit(0)
    finally:
        os._exit(1)

torch.save = slow
while kills < 32:
    pid, log = child(folder / "killed.pt")
    while kills % 4 and " left" not in log.readline():  # one in four at any time
        pass
    time.sleep(rng.uniform(0, 0.8))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert status == signal.SIGKILL, status  # it has neither failed nor come to its end
    kills += 1
    writing += any(folder.glob("killed.pt.*.tmp"))
    if (folder / "killed.pt").exists():
        now = model.load_checkpoint(folder / "killed.pt")["step"]
        assert now >= step
        step = now
fast = True
for name in ("killed.pt", "whole.pt"):
    pid, log = child(folder / name)
    log.read()
    assert os.waitpid(pid, 0)[1] == 0
print(kills, writing, step)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills(tmp_path):
    """32 times SIGKILL, mostly while a slow disk is written; what is there always loads, and the
    end is the same."""
    plan = [*QUICK, "--steps", 100, "--eval_every", 1]
    status, out, err = python("-c", KILLER, tmp_path, *plan)
    assert status == 0, err
    kills, writing, step = map(int, out.split())
    print(f"\n{kills} kills, {writing} of them while a checkpoint was written,", end=" ")
    print(f"the last after step {step}", end="")
    assert kills >= 30 and writing >= 8 and step > 10
    assert torch.equal(weights(tmp_path / "killed.pt"), weights(tmp_path / "whole.pt"))
    logs = []
    for name in ("killed", "whole"):
        lines = [line for line in log.read(tmp_path / f"{name}.jsonl") if "grad_norm" in line]
        logs.append([(line["step"], line["scale"], line["grad_norm"]) for line in lines])
    assert logs[0] == logs[1] and len(logs[0]) == 100
    expected = ["killed.ema.pt", "killed.prev.pt", "killed.pt"]
    expected += ["whole.ema.pt", "whole.prev.pt", "whole.pt"]
    assert sorted(path.name for path in tmp_path.glob("*.pt*")) == expected


@pytest.mark.skipif(not shutil.which("ps"), reason="needs ps")
def test_a_killed_rank_ends_the_job(tmp_path):
    plan = [*QUICK, "--steps", "100000", "--eval_every", "1", "--out", str(tmp_path / "a.pt")]
    job = subprocess.Popen(
        [sys.executable, "-u", *torchrun(2), "train.py", *plan],
        cwd=HERE,
        env=alone(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in job.stdout:
        if line.startswith("     5"):
            break
    children = ["ps", "-o", "pid=", "--ppid", str(job.pid)]
    workers = subprocess.run(children, capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), 9)
    _, err = job.communicate(timeout=100)
    assert job.returncode == 1 and "Signal 9" in err
    assert read(tmp_path / "a.pt")["step"] >= 4
    again = ["train.py", "--resume", "auto", "--out", tmp_path / "a.pt", "--steps", 1]
    status, out, _ = python(*again)
    assert status == 0 and "0 steps" in out


# A full disk, a full memory

LIMITED = """
import resource, runpy, sys
_, name, most, *sys.argv = sys.argv
resource.setrlimit(getattr(resource, name), (int(most), int(most)))
runpy.run_path(sys.argv[0], run_name="__main__")
"""

DISK = """
import resource, sys
import train
first, last, draw_batch = int(sys.argv[1]), int(sys.argv[2]), train.draw_batch
def full(step, *args, **kwargs):
    room = 10**6 if first <= step + 1 <= last else resource.RLIM_INFINITY  # of 12 MB
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    return draw_batch(step, *args, **kwargs)
train.draw_batch = full
train.main(sys.argv[3:])
"""


def test_full_disk(tmp_path):
    pytest.importorskip("resource")
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    plan = [*QUICK, "--steps", 8, "--eval_every", 2, "--out"]
    status, _, err = python("-c", DISK, 3, 5, *plan, a)
    lines = err.strip().splitlines()
    assert status == 0 and len(lines) == 2, err
    assert "step 4: cannot write" in lines[0] and "File too large" in lines[0]
    assert "step 5: cannot write" in lines[1] and read(a)["step"] == 8
    python("train.py", *plan, b)
    assert torch.equal(weights(a), weights(b))  # training did not notice
    for path in tmp_path.glob("a.*"):
        path.unlink()
    status, _, err = python("-c", DISK, 3, 99, *plan, a)  # and if it stays full
    assert status == 1 and "make room" in err.splitlines()[-1] and "Traceback" not in err
    assert read(a)["step"] == 2 and not list(tmp_path.glob("*.tmp"))
    draw = ["sample.py", "--ckpt", b, "--out", tmp_path / "c.png"]
    status, _, err = python("-c", LIMITED, "RLIMIT_FSIZE", 99, *draw)
    assert status == 2 and err.count("\n") == 1 and "File too large" in err
    assert not (tmp_path / "c.png").exists() and not list(tmp_path.glob("*.tmp"))


def test_full_disk_while_an_encoder_is_written(tmp_path):
    pytest.importorskip("resource")
    plan = ["mae.py", "--dataset", "digits", "--size", 16, "--steps", 2, "--width", 8, "--batch", 4]
    command = [*plan, "--device", "cpu", "--out", tmp_path / "a.pt"]
    status, _, err = python("-c", LIMITED, "RLIMIT_FSIZE", 10**5, *command)
    assert status == 2 and err.count("\n") == 1 and "File too large" in err, err
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_one_line(tmp_path):
    pytest.importorskip("resource")
    plan = ["train.py", *QUICK, "--n_gen", 40000, "--out", tmp_path / "a.pt"]
    status, _, err = python("-c", LIMITED, "RLIMIT_AS", 5 * 2**30, *plan)
    assert status == 1 and err.count("\n") == 1 and "--micro_batch" in err, err


# Long runs, bad numbers

SOAK = """
import sys
import train
draw_batch, seen = train.draw_batch, []
def watched(step, *args, **kwargs):
    if step in (500, 1999):
        seen.append(int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20)
    return draw_batch(step, *args, **kwargs)
train.draw_batch = watched
train.main(sys.argv[1:])
print(*seen)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_soak(tmp_path):
    """2,000 steps, with checkpoints, scores and pictures: the memory does not grow."""
    plan = [*QUICK, "--labels", 4, "--n_gen", 4, "--n_pos", 4, "--n_unc", 2, "--steps", 2000]
    plan += ["--eval_every", 250, "--log_every", 500, "--out", tmp_path / "a.pt"]
    status, out, err = python("-c", SOAK, *plan)
    assert status == 0, err
    first, last = map(float, out.splitlines()[-1].split())
    print(f"\nresident after 500 and 2,000 steps: {first:.1f} and {last:.1f} MB", end="")
    assert last < first + 8


def test_a_gradient_that_is_not_finite_is_skipped(monkeypatch, tmp_path, capsys):
    update, poison = training.update, set()

    def poisoned(step, args, params, *rest):
        if step + 1 in poison:
            params[0].grad[0, 0, 0] = float("nan")
        return update(step, args, params, *rest)

    monkeypatch.setattr(training, "update", poisoned)
    monkeypatch.setattr(training, "N_EVAL", 20)
    plan = [*QUICK, "--steps", 8, "--ema", 0, "--warmup", 0, "--decay", 0]
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"

    def train(*args):
        training.main([str(value) for value in (*plan, *args)])

    poison |= {4, 5}
    train("--out", a, "--stop_after", 5)
    assert "2 steps skipped" in capsys.readouterr().out
    poison.clear()
    train("--out", b, "--stop_after", 3)
    assert torch.equal(weights(a), weights(b))  # as if they had not been
    with_, without = (read(path)["optimizer"]["state"][0] for path in (a, b))
    assert with_["step"] == without["step"] == 3
    assert torch.equal(with_["exp_avg_sq"], without["exp_avg_sq"])
    before = a.read_bytes()
    poison |= set(range(10, 20))
    message = r"step 19: ten gradients in a row.*a\.pt keeps.*lower --lr"
    with pytest.raises(SystemExit, match=message):
        train("--resume", a, "--steps", 100)
    assert a.read_bytes() == before
    poison.remove(15)  # nine in all, but not in a row
    train("--resume", a, "--steps", 25)
    assert read(a)["step"] == 25


# Fuzzing


def damaged(whole, n, seed=0):
    """n variants of some bytes: cut short, some bits flipped, or a stretch overwritten."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        raw = bytearray(whole)
        if i % 3 == 0:
            yield bytes(raw[: rng.integers(len(raw))])
            continue
        for _ in range(rng.integers(1, 4)):
            among = len(raw) if rng.random() < 0.5 else min(len(raw), 400)
            raw[rng.integers(among)] ^= 1 << rng.integers(8)
        if i % 3 == 2:
            where = rng.integers(len(raw))
            raw[where : where + 20] = rng.bytes(len(raw[where : where + 20]))
        yield bytes(raw)


def survivors(read, path, n, seed=0):
    """Calls read() with n damaged variants of the file at path: how many it takes for whole.

    For any other it must raise a ValueError or OSError of one line.
    """
    whole, works = path.read_bytes(), 0
    read()  # as it is, it works
    for raw in damaged(whole, n, seed):
        if raw == whole:
            continue
        path.write_bytes(raw)
        try:
            read()
            works += 1
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)
    path.write_bytes(whole)
    return works


def test_fuzzed_checkpoints(tmp_path, checkpoint, tiny_mae):
    """They have checksums: whatever is damaged, is refused."""
    a = tmp_path / "a.pt"
    small = DiT(DiTConfig(8, 1, 4, hidden_size=8, depth=1, num_heads=2, n_cls_tokens=1))
    state = small.state_dict()
    torch.save(read(checkpoint) | dict(model=state, ema=state, config=vars(small.config)), a)
    assert survivors(lambda: DiT.load(a), a, 150) == 0
    assert survivors(lambda: training.parse(["--resume", str(a)]), a, 60, seed=1) == 0
    assert survivors(lambda: mae.load_mae(tiny_mae), tiny_mae, 60) == 0


@pytest.mark.parametrize("packed", [False, True])
def test_fuzzed_idx_files(tmp_path, packed):
    labels, rng = np.arange(30, dtype=np.uint8) % 10, np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, rng.integers(0, 256, (30, 9, 9), np.uint8), labels, packed)
    for path in sorted(raw.iterdir()):
        works = survivors(lambda: data.load("mnist", tmp_path), path, 90)
        # what hits pixels only cannot be seen
        assert works < 90 * (0.7 if packed or "images" in path.name else 0.5)


def test_fuzzed_pickles(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-py", 3)
    for name in ("data_batch_2", "batches.meta"):
        path = tmp_path / "cifar-10-batches-py" / name
        assert survivors(lambda: data.load("cifar10", tmp_path), path, 150) < 150


def test_fuzzed_arrays(tmp_path):
    a = tmp_path / "a.npz"
    np.savez(a, arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    assert survivors(lambda: fid.load_set(str(a), tmp_path), a, 60) < 60
    np.savez(a, arr_0=np.zeros((5, 4, 2, 2)), labels=np.arange(5))
    assert survivors(lambda: data.load(f"npz:{a}"), a, 90) < 60
    write_folder(tmp_path / "pets", 3)
    name, folder = f"folder:{tmp_path}/pets", tmp_path / "cache"
    data.load(name, folder, 8)
    [cache] = folder.iterdir()
    assert survivors(lambda: data.load(name, folder, 8), cache, 60) < 60
    assert list(folder.iterdir()) == [cache]


def test_fuzzed_logs(monkeypatch, tmp_path):
    """What is left of one is drawn and gone on with."""
    needs("matplotlib")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)
    a, first = tmp_path / "a.jsonl", dict(torch="2", run="ab", seed=0)
    told = {"seconds": 1.5, "drift_0.2": 0.1, "fd": 2.0, "real_fd": 1.0, "copies": 0.0}
    lines = [first, *(dict(step=i, images=8 * i, **told) for i in range(1, 9))]
    a.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def go_on():
        log.Log(a, first, 4, ["seed"])
        log.draw([a], tmp_path / "a.png")

    assert 0 < survivors(go_on, a, 30) < 30


def test_fuzzed_exports(monkeypatch, tmp_path, checkpoint):
    needs("safetensors")
    monkeypatch.setattr(hub, "known_scores", lambda ckpt: {})
    hub.export(checkpoint, tmp_path / "a")
    for name in ("config.json", "model.safetensors"):
        assert survivors(lambda: DiT.load(tmp_path / "a"), tmp_path / "a" / name, 90) < 60


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"])
def test_fuzzed_images(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    file = tmp_path / f"a.{kind}"
    Image.fromarray(noise).save(file)
    assert survivors(lambda: data.read_image(file), file, 60) < 60


def test_fuzzed_flags_are_one_line(monkeypatch, capsys):
    """Out of range, NaN, no number: some flags of every script."""
    huge = "9" * 30
    cases = {
        "train.py": [
            "steps nan",
            "steps 2.5",
            "lr -1",
            "lr inf",
            "lr x",
            f"seed {huge}",
            "ema 1.1",
            "taus 0",
            "labels 0",
            "alpha_one nan",
        ],
        "sample.py": ["n 0", "n 1e3", f"n {huge}", "cfg nan", "cfg inf", "seed -1", "batch -3"],
        "mae.py": ["size 0", "width -3", f"steps {huge}", "lr nan", "cls_steps -1", "seed 0x10"],
        "fid.py": ["n 3", "size x", "cfg nan", f"batch {huge}", "seed -3", "network_size 1,5"],
        "bench.py": ["size -3", f"patch {huge}", "labels nan", "n_gen 1", "n_unc -1", "steps 0"],
        "drift.py": ["steps 0", "steps 2.5", "iters -3", "iters x", "floor nan", "floor 2"],
    }
    needed = {"sample.py": ["--ckpt", "none.pt"], "fid.py": ["digits", "digits"]}
    count = 0
    for script, flags in cases.items():
        for flag in flags:
            name, value = flag.split()
            line = fails(monkeypatch, capsys, script, *needed.get(script, []), f"--{name}", value)
            assert name in line, (script, flag, line)
            count += 1
    assert count > 40


def test_every_number_of_the_trainer_has_a_range(capsys):
    """A number that is no number never comes through."""
    flags = "size encoder_size pools windows patch steps lr warmup decay wd ema labels n_gen n_pos "
    flags += "n_unc micro_batch taus iters floor alpha_max alpha_k alpha_one log_every eval_every "
    flags += "fid_every stop_after seed"
    script_flags = [(training.parse, [], flag) for flag in flags.split()]
    script_flags += [(sample.parse, ["--ckpt", "a"], f) for f in ("n", "cfg", "seed", "batch")]
    for parse, needed, flag in script_flags:
        for value in ("nan", "inf", "-inf", "1e400", "9" * 30, "x", "", "0x10", "1,5"):
            with pytest.raises(SystemExit) as stop:
                parse([*needed, f"--{flag}={value}"])
            line = capsys.readouterr().err.splitlines()[-1]
            assert stop.value.code == 2 and f"argument --{flag}: " in line, (flag, value)
        for value in ("-1", "-0.5", "0", "2.5"):
            try:
                parsed = parse([*needed, f"--{flag}={value}"])
                parsed = getattr(parsed[0] if isinstance(parsed, tuple) else parsed, flag)
                parsed = parsed[0] if isinstance(parsed, list) else parsed
                assert math.isfinite(parsed) and (parsed >= 0 or flag in ("alpha_k", "cfg"))
            except SystemExit as stop:
                assert stop.code == 2 and "error: argument" in capsys.readouterr().err
