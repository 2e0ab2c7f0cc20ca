"""The trainer: arguments, encoders, averages, micro-batches, ranks, signals, resuming, streams."""

import functools
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import log
import mae
import train as training
from conftest import (
    HERE,
    QUICK,
    TYPED,
    alone,
    fails,
    first_gradient,
    needs,
    python,
    read,
    relative,
    run,
    save_mae,
    torchrun,
    train,
    weights,
    write_folder,
)
from model import DiT, DiTConfig


def pets(folder, *args):
    """Flags of a run of two classes of photographs of 16 x 16, which it writes."""
    if not (folder / "pets").exists():
        write_folder(folder / "pets")
    plan = [*QUICK, "--dataset", f"folder:{folder}/pets", "--data_dir", folder / "data"]
    return [*plan, "--size", 16, "--n_pos", 4, "--labels", 2, *args]


# Arguments


def test_presets():
    small, none = training.parse(["--dataset", "cifar10-16", "--patch", "8"])
    assert (small.dataset, small.size, small.windows) == ("cifar10", 16, [4, 8])
    assert small.patch == 8 and none is None  # flags override
    assert training.parse(["--dataset", "cifar10-16", "--no-flip"])[0].flip is False
    large, _ = training.parse(["--dataset", "cifar10"])
    assert (large.size, large.model, large.flip, large.micro_batch) == (32, "S", True, None)
    assert training.parse([])[0].size == 8
    assert training.parse(["--dataset", "folder:some/where"])[0].size == 64
    known = {"digits", "mnist", "fashion", "cifar10", "cifar10-16", "folder", "npz"}
    assert known <= set(training.PRESETS)


def test_without_labels_there_is_one_group(tmp_path):
    def plan(*args):
        args, _ = training.parse([str(a) for a in args])
        assert args.unconditional == (args.n_unc == 0) == (args.alpha_max == 1)
        return args.labels, args.n_gen, args.n_pos

    mnist = ["--dataset", "mnist", "--unconditional"]
    assert plan(*mnist) == (1, 320, 1280) and plan(*mnist, "--n_gen", 16) == (1, 16, 1280)
    folder, npz = f"folder:{write_folder(tmp_path / 'pets')}", f"npz:{tmp_path}/a.npz"
    assert plan("--dataset", folder) == (10, 32, 32)
    assert plan("--dataset", f"{folder}/cats") == (1, 320, 320)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8), labels=np.zeros(9, int))
    assert plan("--dataset", npz) == (10, 32, 32)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    assert plan("--dataset", npz) == (1, 320, 320)


def save_arguments(args):
    """A checkpoint of a run with these arguments, with all that parse() looks at."""
    net = DiT(DiTConfig(args.size, patch_size=args.patch, hidden_size=8, depth=1, num_heads=1))
    stored = dict(config=vars(net.config), args=training.to_store(args), step=7)
    torch.save(stored | dict(model=net.state_dict()), args.out)


@pytest.mark.parametrize("preset", training.PRESETS)
def test_a_resumed_run_has_the_arguments_that_it_began_with(tmp_path, preset):
    """Whatever the preset of its data set says; and others on request."""
    kind = training.PRESETS[preset].get("dataset", preset)
    name = f"{preset}:{tmp_path}/a b" if kind in ("folder", "npz", "latents") else preset
    out, flags = tmp_path / "a.pt", ["--labels", "40", "--alpha_k", "-2.5", "--taus", "0.1", "1"]
    args, _ = training.parse(["--dataset", name, *flags, "--out", str(out), "--device", "cpu"])
    args.size = args.size or 32  # as the data have it
    save_arguments(args)
    again, checkpoint = training.parse(["--resume", str(out)])
    assert checkpoint["step"] == 7 and training.to_store(again) == training.to_store(args)
    again, _ = training.parse(["--resume", str(out), "--lr", "0.5", "--stop_after", "9"])
    assert (again.lr, again.stop_after, again.labels) == (0.5, 9, 40)


@pytest.mark.parametrize("flag", ["--alpha_k=-1e-05", "--lr=1e-30", "--no-flip", "--data_dir=-x"])
def test_a_resumed_run_takes_what_could_be_taken_for_a_flag(tmp_path, flag):
    args, _ = training.parse([flag, "--out", str(tmp_path / "a.pt"), "--device", "cpu"])
    save_arguments(args)
    again, _ = training.parse(["--resume", args.out])
    assert training.to_store(again) == training.to_store(args)


def test_alpha_has_the_stated_density():
    for k in (1, 3):
        args, _ = training.parse(["--alpha_k", str(k), "--alpha_one", "0.25"])
        alpha = training.draw_alpha(40000, args, torch.Generator().manual_seed(0))
        assert (alpha == 1).float().mean().item() == pytest.approx(0.25, abs=0.01)
        above = alpha[alpha != 1].double()
        grid = torch.linspace(1, 4, 100001, dtype=torch.float64)
        density = grid**-k / (grid**-k).sum()
        assert above.mean().item() == pytest.approx((grid * density).sum().item(), rel=0.01)
        tenth = grid[(density.cumsum(0) < 0.9).sum()].item()
        assert above.quantile(0.9).item() == pytest.approx(tenth, rel=0.02)


def test_learning_rate():
    args, _ = training.parse(["--steps", "100", "--lr", "2", "--warmup", "10", "--decay", "0.5"])
    rates = [args.lr * training.schedule(step, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9:51] == [2] * 42
    assert rates[75] == pytest.approx(1) and rates[99] == pytest.approx(0.04)
    args.warmup, args.decay = 0, 0
    assert {training.schedule(step, args) for step in range(100)} == {1}


def test_train_bad_input(monkeypatch, tmp_path, checkpoint, capsys):
    out = tmp_path / "keep.pt"
    out.write_text("precious")

    def bad(*args):
        return fails(monkeypatch, capsys, "train.py", "--out", out, *args)

    assert "there are tiny, S, B, L" in bad("--model", "XL")
    assert "is a folder" in bad("--out", tmp_path)
    assert "see features.py" in bad("--encoder", "pixels,nothing")
    assert "keep.pt is damaged" in bad("--encoder", out)
    assert "not a checkpoint of mae.py" in bad("--encoder", checkpoint)
    assert "keep.pt is damaged" in bad("--init", out)
    mae_of_4 = ["--encoder", "mae", "--data_dir", tmp_path / "data"]
    assert "too small" in bad("--size", 4, *mae_of_4)  # 4 pixels, and a stride of 8
    assert "must be from 2" in bad("--n_gen", 1)
    (tmp_path / "text.pt").write_text("hello")
    assert "cannot resume" in bad("--resume", tmp_path / "text.pt")
    assert "--patch 2 differs from 4" in bad("--resume", checkpoint, "--patch", 2)
    assert out.read_text() == "precious"


def test_resume_refuses_what_does_not_fit(monkeypatch, tmp_path, checkpoint, capsys):
    def bad(path, *args):
        return fails(monkeypatch, capsys, "train.py", "--resume", path, *args)

    other = dict(dataset="mnist", size=16, encoder="mae", pools=2, windows=4, model="S", patch=2)
    other |= dict(edges=True)
    assert set(other) == set(training.FIXED)
    for flag, value in other.items():
        line = bad(checkpoint, f"--{flag}", *([] if value is True else [value]))
        assert f"--{flag} " in line and "differs" in line
    plan = pets(tmp_path, "--size", 8, "--encoder", "pixels", "--patch", 4)
    train(*plan, "--steps", 1, "--out", tmp_path / "a.pt")
    (tmp_path / "pets" / "dogs").rename(tmp_path / "pets" / "eels")
    line = bad(tmp_path / "a.pt")
    assert "--dataset" in line and "'dogs'" in line
    odd = read(checkpoint)
    changes = dict(
        args=odd["args"] | {"taus": "wide"},
        config=odd["config"] | {"depth": "x"},
        ema={},
        step={},
        optimizer={"a": 1},
        model={},
    )
    for key, value in changes.items():
        torch.save(odd | {key: value}, tmp_path / "odd.pt")
        bad(tmp_path / "odd.pt")


def test_resume_auto(monkeypatch, tmp_path, capsys):
    a, prev, other = tmp_path / "a.pt", tmp_path / "a.prev.pt", tmp_path / "c.pt"
    auto = ["--resume", "auto", *QUICK, "--out"]

    def steps(*paths):
        return [read(path)["step"] for path in paths]

    train(*auto, a, "--steps", 4, "--eval_every", 2)
    assert "a new start" in capsys.readouterr().out
    assert steps(a, prev) == [4, 2]
    shutil.copy(a, other)  # moved: goes on where it is
    train(*auto, other, "--steps", 5)
    assert steps(other, a) == [5, 4]
    flipped = bytearray(a.read_bytes())
    flipped[len(flipped) // 2] ^= 1  # one bit, which torch.load does not see
    a.write_bytes(flipped)
    train(*auto, a, "--steps", 6, "--eval_every", 6)
    assert "warning: cannot resume from" in capsys.readouterr().err
    assert steps(a, prev) == [6, 2]  # the good one was not pushed out
    assert (tmp_path / "a.pt.damaged").read_bytes() == flipped
    a.write_bytes(flipped)
    prev.write_bytes(flipped[:1000])
    assert "a.prev.pt" in fails(monkeypatch, capsys, "train.py", *auto, a)
    assert a.read_bytes() == flipped  # not started over


# Encoders


def test_default_encoder_is_trained_once_and_not_needed_to_sample(monkeypatch, tmp_path, capsys):
    small = functools.partial(mae.train_mae, layers=(1, 1, 1, 1), steps=2, batch=4)
    monkeypatch.setattr(mae, "train_mae", small)
    plan = pets(tmp_path, "--encoder", "mae", "--patch", 4, "--n_gen", 4, "--steps", 2)
    train(*plan, "--out", tmp_path / "a.pt", "--stop_after", 1)
    kept = tmp_path / "data" / "mae_pets_16_32.pt"
    assert f"training an encoder first, {kept}" in capsys.readouterr().out
    assert kept.with_suffix(".png").exists()
    before = kept.stat().st_mtime_ns
    train("--resume", tmp_path / "a.pt")
    assert "training an encoder" not in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before and read(tmp_path / "a.pt")["step"] == 2
    kept.unlink()
    for module in ("features", "mae", "train"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it would fail
    draw = ["sample.py", "--ckpt", tmp_path / "a.pt", "--n", 4, "--out", tmp_path / "a.npz"]
    run(monkeypatch, *draw)
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (4, 16, 16, 3)


def test_an_encoder_that_cannot_be_had_is_missed_before_another_is_trained(
    monkeypatch, tmp_path, capsys
):
    plan = pets(tmp_path, "--encoder", "mae,none.pt", "--out", tmp_path / "a.pt")
    assert "none.pt" in fails(monkeypatch, capsys, "train.py", *plan)
    assert not list((tmp_path / "data").glob("mae_*"))


def test_several_encoders_in_training(tmp_path):
    for name, width in (("one", 4), ("two", 8)):
        save_mae(mae.MAE(1, 16, width, layers=(1, 1, 1, 1)), tmp_path / f"{name}.pt")
    both = f"{tmp_path}/one.pt,{tmp_path}/two.pt"
    plan = [*QUICK, "--size", 16, "--steps", 3, "--warmup", 0, "--pools", 4, "--encoder"]
    train(*plan, both, "--out", tmp_path / "both.pt")
    train(*plan, f"{tmp_path}/one.pt", "--out", tmp_path / "alone.pt")
    assert read(tmp_path / "both.pt")["step"] == 3
    # both have a say, from the second step on: of zeros, every map is zero
    assert relative(weights(tmp_path / "both.pt"), weights(tmp_path / "alone.pt")) > 1e-3


def test_timm_in_training(tmp_path):
    needs("timm")
    import timm

    net = timm.create_model("test_vit", pretrained=False)
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    spec = f"timm:test_vit={tmp_path}/vit.pth"
    plan = pets(tmp_path, "--patch", 4, "--encoder", spec, "--encoder_size", 32, "--steps", 2)
    train(*plan, "--out", tmp_path / "a.pt", "--stop_after", 1)
    train("--resume", tmp_path / "a.pt")
    assert read(tmp_path / "a.pt")["step"] == 2


# Data without labels, data that are no pictures


def test_training_without_labels(monkeypatch, tmp_path, capsys, stubs):
    a, npz = tmp_path / "a.pt", tmp_path / "a.npz"
    train(*QUICK, "--unconditional", "--steps", 4, "--out", a, "--stop_after", 2)
    train("--resume", a)
    assert "1,797 images of 1 classes" in capsys.readouterr().out
    assert read(a)["step"] == 4 and read(a)["classes"] == ["all"]
    assert Image.open(tmp_path / "samples.png").size == (10 * 70, 2 * 70)
    draw = ["sample.py", "--ckpt", a, "--n", 20, "--out"]
    run(monkeypatch, *draw, npz)
    assert np.load(npz)["labels"].tolist() == [0] * 20
    run(monkeypatch, *draw, tmp_path / "near.png", "--nearest", "digits")
    assert Image.open(tmp_path / "near.png").size == (16 * 70, 6 * 70)
    assert "0 to 0" in fails(monkeypatch, capsys, *draw, npz, "--classes", 1)
    judge = ["fid.py", "--n", 20, "--inception", stubs / "original.pt", "--data_dir", tmp_path]
    run(monkeypatch, *judge, "--ckpt", a, "--dataset", "digits")
    run(monkeypatch, *judge, npz, "digits")
    found = [line.split("FID-20 ")[1] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert found[0] == found[1]  # the same samples


def test_training_on_images_in_one_folder(tmp_path):
    cats = f"folder:{write_folder(tmp_path / 'pets')}/cats"
    cats = [f"{cats}/more", "--size", 16, "--encoder", "pixels", "--data_dir", tmp_path / "data"]
    train(*QUICK, "--n_pos", 4, "--dataset", *cats, "--steps", 1, "--out", tmp_path / "a.pt")
    assert read(tmp_path / "a.pt")["config"]["num_classes"] == 1


def test_training_on_floats(monkeypatch, tmp_path, capsys):
    """Of five channels: their samples are floats, too, not clamped, and a data set again."""
    small = functools.partial(mae.train_mae, layers=(1, 1, 1, 1), steps=2, batch=4)
    monkeypatch.setattr(mae, "train_mae", small)
    np.savez(tmp_path / "fields.npz", arr_0=3 * np.random.randn(40, 5, 8, 8))
    plan = [*QUICK, "--data_dir", tmp_path, "--steps", 1, "--dataset", f"npz:{tmp_path}/fields.npz"]

    def bad(*args):
        return fails(monkeypatch, capsys, "train.py", *plan, "--out", tmp_path / "c.pt", *args)

    assert "is for images of 1 or 3 channels, not 5" in bad("--encoder", "timm:test_vit")
    assert "--fid_every needs images of 8 bits" in bad("--encoder", "pixels", "--fid_every", 1)
    train(*plan, "--out", tmp_path / "a.pt")
    train(*plan, "--out", tmp_path / "b.pt", "--resume", "auto", "--steps", 2)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"mae_fields_8_32.pt", "a.pt", "b.pt"} <= names
    assert not any(name.endswith(".png") for name in names)

    saved = read(tmp_path / "a.pt")
    saved["ema"]["final_proj.bias"] += 2
    torch.save(saved, tmp_path / "a.pt")
    draw = ["sample.py", "--ckpt", tmp_path / "a.pt", "--n", 20, "--out"]
    assert "of 5 channels" in fails(monkeypatch, capsys, *draw, tmp_path / "s.png")
    run(monkeypatch, *draw, tmp_path / "s.npz")
    images, labels, _ = data.load(f"npz:{tmp_path}/s.npz")
    net = DiT.load(tmp_path / "a.pt")[0].eval()
    assert torch.equal(images, net.generate(labels, 1.0, torch.Generator().manual_seed(0)))
    assert images.min() > 1 and images.shape == (20, 5, 8, 8)
    again = ["--dataset", f"npz:{tmp_path}/s.npz", "--encoder", "pixels", "--labels", 1]
    train(*plan, *again, "--out", tmp_path / "d.pt")
    assert read(tmp_path / "d.pt")["config"]["in_channels"] == 5


# Averages, parts, ranks


def test_ema_is_the_average_and_what_is_sampled(monkeypatch, tmp_path):
    plan = [*QUICK, "--steps", 1, "--warmup", 0, "--ema", 0.9]
    train(*plan, "--out", tmp_path / "a.pt")
    checkpoint = read(tmp_path / "a.pt")
    torch.manual_seed(0)
    start = DiT(DiTConfig(**checkpoint["config"])).state_dict()
    moved = 0
    for name, end in checkpoint["model"].items():
        torch.testing.assert_close(checkpoint["ema"][name], start[name].lerp(end, 0.1))
        moved += not torch.equal(start[name], end)
    assert moved
    draw = ["sample.py", "--ckpt", tmp_path / "a.pt", "--n", 4, "--out"]
    run(monkeypatch, *draw, tmp_path / "a.npz")
    other = {name: end + 1 for name, end in checkpoint["model"].items()}
    torch.save(checkpoint | {"model": other}, tmp_path / "a.pt")
    run(monkeypatch, *draw, tmp_path / "b.npz")
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert (a["arr_0"] == b["arr_0"]).all()


def test_half_precision_weights(tmp_path, checkpoint):
    """out.ema.pt: two bytes for each averaged weight, the same pictures, a start for a run."""
    slim, model = checkpoint.with_name("a.ema.pt"), DiT.load(checkpoint)[0]
    assert slim.stat().st_size < 2.1 * sum(p.numel() for p in model.parameters())
    images = []
    for net in (model, DiT.load(slim)[0]):
        g = torch.Generator().manual_seed(0)
        images.append(net.eval().generate(torch.arange(10), 1.0, g))
    assert 0 < (images[0] - images[1]).abs().max() < 0.01
    train(*QUICK, "--init", slim, "--steps", 1, "--lr", 0, "--out", tmp_path / "b.pt")
    a, b = DiT.load(slim)[0], DiT.load(tmp_path / "b.pt")[0]
    assert torch.equal(a.final_proj.weight, b.final_proj.weight)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["pixels", "encoder"])
def test_micro_batches_give_the_same_gradient(
    tmp_path, checkpoint, tiny_mae, kind, dtype, tolerance
):
    """Cut between labels, within labels, across labels and one by one; in pixels and in the
    features of an encoder."""
    torch.set_default_dtype(dtype)
    plan = [*QUICK, "--init", checkpoint]
    if kind == "encoder":
        plan = pets(tmp_path, "--patch", 4, "--encoder", tiny_mae, "--labels", 5)
    plan += ["--steps", 1, "--warmup", 0, "--out"]
    train(*plan, tmp_path / "whole.pt")
    whole = first_gradient(tmp_path / "whole.pt")
    assert whole.dtype == dtype and whole.norm() > 0
    for size in (16, 4, 13, 1):
        train(*plan, tmp_path / f"{size}.pt", "--micro_batch", size)
        assert relative(first_gradient(tmp_path / f"{size}.pt"), whole) < tolerance, size


def test_micro_batches_hold_the_activations_of_one_part(tmp_path, checkpoint):
    held, most = 0, 0

    def pack(t):
        nonlocal held, most
        held += t.nbytes
        most = max(most, held)
        return t

    def unpack(t):
        nonlocal held
        held -= t.nbytes
        return t

    plan = [*QUICK, "--init", checkpoint, "--steps", 1, "--n_gen", 32, "--out"]
    peaks = []
    for extra in ([tmp_path / "a.pt"], [tmp_path / "b.pt", "--micro_batch", 32]):
        held = most = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            train(*plan, *extra)
        peaks.append(most)
    assert peaks[1] < 0.15 * peaks[0], peaks  # one of ten labels, and the weights


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-4)])
def test_any_number_of_ranks_takes_the_same_steps(tmp_path, dtype, tolerance):
    """1, 2 and 4 ranks end with the same weights after 5 steps, two of them in micro-batches."""
    (tmp_path / "typed.py").write_text(TYPED)
    ends, logs = {}, {}
    for ranks, more in ((1, []), (2, ["--micro_batch", "9"]), (4, [])):
        out = str(tmp_path / f"{ranks}.pt")
        launch = torchrun(ranks) if ranks > 1 else []
        script = [str(tmp_path / "typed.py"), dtype, "train.py", *QUICK, "--labels", "12"]
        command = [*launch, *script, "--steps", "5", "--warmup", "0", "--out", out, *more]
        status, printed, err = python(*command)
        assert status == 0, err
        assert f"{ranks} x cpu" in printed and "12 x 8 samples" in printed  # two labels come twice
        ends[ranks] = weights(out)
        lines = log.read(tmp_path / f"{ranks}.jsonl")
        logs[ranks] = [line for line in lines if "grad_norm" in line]
        assert [line["images"] for line in logs[ranks]] == [96, 192, 288, 384, 480]
        for one, line in zip(logs[1], logs[ranks], strict=True):  # of all ranks
            for name in ("drift_0.2", "scale", "grad_norm"):
                assert line[name] == pytest.approx(one[name], rel=1e-3), name
    off = [relative(ends[ranks], ends[1]) for ranks in (2, 4)]
    print(f"\n{dtype}: weights of 2 and 4 ranks against 1, relative: {off[0]:.1e}, {off[1]:.1e}")
    assert ends[1].dtype == getattr(torch, dtype) and max(off) < tolerance, off


def test_labels_are_a_multiple_of_the_ranks(tmp_path):
    plan = [*QUICK, "--steps", 1, "--labels", 5, "--out", tmp_path / "a.pt"]
    status, out, err = python(*torchrun(2), "train.py", *plan)
    assert status == 0 and "2 x cpu" in out and "6 x 8 samples" in out, err


def test_an_error_of_the_data_ends_all_ranks(tmp_path):
    """The first rank alone reads them; the other must not wait for ever."""
    plan = [*QUICK, "--dataset", f"folder:{tmp_path}/none", "--out", tmp_path / "a.pt"]
    status, _, err = python(*torchrun(2), "train.py", *plan)
    assert status != 0 and "there is no folder" in err


# Signals


def start(*args):
    return subprocess.Popen(
        [sys.executable, "-u", *map(str, args)],
        cwd=HERE,
        env=alone(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(job, text):
    for line in job.stdout:
        if text in line:
            return
    raise AssertionError(job.stderr.read())


BOTH = pytest.mark.parametrize("sig, status", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])


@BOTH
def test_a_signal_saves_first(tmp_path, sig, status):
    job = start("train.py", *QUICK, "--steps", 100000, "--out", tmp_path / "a.pt")
    wait_for(job, "left")  # the first step is done
    job.send_signal(sig)
    out, err = job.communicate(timeout=60)
    assert job.returncode == status and "--resume" in out and err == ""
    assert read(tmp_path / "a.pt")["step"] >= 1


@BOTH
def test_a_signal_before_the_first_step(tmp_path, sig, status):
    plan = [*QUICK, "--encoder", "mae", "--size", 16, "--data_dir", tmp_path]
    job = start("train.py", *plan, "--out", tmp_path / "a.pt")
    wait_for(job, "loss of")  # the encoder has begun to learn
    job.send_signal(sig)
    out, err = job.communicate(timeout=60)
    assert job.returncode == status and err == "" and "the same command" in out
    assert not (tmp_path / "a.pt").exists()


SLOW = """
import sys, time
import train
draw_batch = train.draw_batch
def slow(step, *args, **kwargs):
    if step == 1:
        print("it takes long", flush=True)
        time.sleep(300)
    return draw_batch(step, *args, **kwargs)
train.draw_batch = slow
train.main(sys.argv[1:])
"""


@BOTH
def test_a_second_signal_stops_at_once(tmp_path, sig, status):
    """Though a step takes long, and the first signal waits for its end."""
    job = start("-c", SLOW, *QUICK, "--steps", 5, "--eval_every", 1, "--out", tmp_path / "a.pt")
    wait_for(job, "it takes long")
    job.send_signal(sig)
    with pytest.raises(subprocess.TimeoutExpired):
        job.wait(timeout=2)
    job.send_signal(sig)
    out, err = job.communicate(timeout=30)
    assert job.returncode == status and "stopped at once" in out and err == ""
    assert read(tmp_path / "a.pt")["step"] == 1  # the last that was whole
    assert not list(tmp_path.glob("*.tmp"))


def test_a_signal_to_one_rank_stops_both_after_the_same_step(tmp_path):
    code = "import os, signal, sys, train; draw_batch = train.draw_batch\n"
    code += "def interrupted(step, *args, **kwargs):\n"
    code += "    if step == 2 and os.environ['RANK'] == '1':\n"
    code += "        os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "    return draw_batch(step, *args, **kwargs)\n"
    code += "train.draw_batch = interrupted\n"
    code += "train.main(sys.argv[1:])\n"
    (tmp_path / "interrupted.py").write_text(code)
    plan = [*QUICK, "--steps", 50, "--out", tmp_path / "a.pt"]
    status, out, err = python(*torchrun(2), tmp_path / "interrupted.py", *plan)
    assert status == 0 and "stopped after step 3" in out, err
    assert read(tmp_path / "a.pt")["step"] == 3


# Randomness


def test_deterministic(tmp_path, tiny_mae):
    plan = pets(tmp_path, "--patch", 4, "--steps", 3, "--encoder", tiny_mae, "--deterministic")
    for name in "ab":
        train(*plan, "--out", tmp_path / f"{name}.pt")
    assert torch.equal(weights(tmp_path / "a.pt"), weights(tmp_path / "b.pt"))


def test_streams_are_separate(monkeypatch, tmp_path):
    """What one purpose draws reshuffles no other: data and noise do not move, but for the seed."""
    seen = []

    def watch(kind):
        draw = kind.draw

        def watched(*args):
            pair = draw(*args)
            seen.append(pair[0].clone())
            return pair

        monkeypatch.setattr(kind, "draw", watched)

    watch(data.Sampler)
    watch(DiT)

    def drawn(name, *change):
        seen.clear()
        train(*QUICK, "--steps", 2, "--out", tmp_path / f"{name}.pt", *change)
        return list(seen)

    first = drawn("first")
    changes = dict(alpha_max=2, alpha_k=1, alpha_one=0.9, taus=0.1, lr=0.1, seed=1)
    for flag, value in changes.items():
        other = drawn(flag, f"--{flag}", value)
        same = len(other) == len(first) and all(map(torch.equal, other, first))
        assert same == (flag != "seed"), flag


def test_classes_come_once_before_one_comes_twice(tmp_path):
    images, labels, _ = data.load("digits")
    sampler = data.Sampler(images, labels, "cpu")
    net = DiT(DiTConfig(8, 1, 4, hidden_size=8, depth=1, num_heads=1))
    args, _ = training.parse([*QUICK, "--labels", "25"])
    drawn = [training.draw_batch(step, args, sampler, net, slice(None)) for step in range(3)]
    for label, alpha, pos, unc, noise, style in drawn:
        assert sorted(label[:10].tolist()) == sorted(label[10:20].tolist()) == list(range(10))
        assert len(set(label[20:].tolist())) == 5 and alpha.shape == (25,)
        assert pos.shape[:2] == (25, 8) and unc.shape[:2] == (25, 4)
        assert noise.shape[0] == style.shape[0] == 200
    assert not torch.equal(drawn[0][0], drawn[1][0])
    part = training.draw_batch(1, args, sampler, net, slice(5, 10))
    for mine, whole, n in zip(part, drawn[1], (1, 1, 1, 1, 8, 8), strict=True):
        assert torch.equal(mine, whole[5 * n : 10 * n])
    args, _ = training.parse([*QUICK, "--labels", "25", "--n_unc", "0"])
    assert args.alpha_max == 1  # which sample.py compares --cfg with
    assert (training.draw_batch(0, args, sampler, net, slice(None))[1] == 1).all()
