"""What is proven, in less than a minute of two cores, without a network or a GPU:

    the drift field and the loss    equal plain loops, and the authors' JAX code, number by number;
                                    and they have the properties that the paper argues from
    the generator, the encoder      equal the authors' JAX code, on weights that it has written
    training                        learns digits; takes the same steps if it is resumed, cut into
                                    parts or on two ranks; leaves a whole checkpoint when killed
    what a user gets wrong          is one line

$ python -m pytest -q           # this file
$ python -m pytest -q -s        # and with the errors that were measured
$ python -m pytest -q tests     # every script and file
"""

import math
import signal
import subprocess
import time

import numpy as np
import pytest
import torch

import drift
import features
import train
from conftest import ASSETS, needs, our_mae, relative, start
from drift import drift_field, drift_loss
from imagenet import convert

# Computed with the authors' JAX code
GOLDEN = np.load(ASSETS / "golden_drift.npz")
GOLDEN_DIT = np.load(ASSETS / "golden_generator.npz")
GOLDEN_MAE = np.load(ASSETS / "golden_mae.npz")
QUICK = ["--log_every", "1", "--device", "cpu", "--n_gen", "8", "--n_pos", "8", "--n_unc", "4"]


def problem(G=3, N=6, P=5, U=4, C=3):
    """x, y_pos, y_unc, w_unc of a drift problem, float64."""
    x, y_pos, y_unc = torch.randn(G, N, C), torch.randn(G, P, C) + 1, 2 * torch.randn(G, U, C)
    return [t.double() for t in (x, y_pos, y_unc, torch.rand(G, U) * 3)]


def loss_and_grad(x, *args, **kwargs):
    x = x.clone().requires_grad_()
    loss, stats = drift_loss(x, *args, **kwargs)
    loss.backward()
    return loss.detach(), x.grad, stats


# The field and the loss, against plain loops


def slow_field(x, y, n_neg, tau, w):
    """Algorithm 2 for one group, V [N, C], with loops over lists; the first N rows of y are x."""
    N, T, C = len(x), len(y), len(x[0])
    near = [[math.exp(-math.dist(a, b) / tau) for b in y] for a in x]
    for i in range(N):
        near[i][i] = 0  # no sample sees itself
    row = [sum(near[i]) for i in range(N)]
    col = [sum(near[i][j] for i in range(N)) for j in range(T)]
    V = []
    for i in range(N):
        A = []
        for j in range(T):
            softmax_y, softmax_x = near[i][j] / row[i], near[i][j] / col[j]
            A.append(math.sqrt(softmax_y * softmax_x) * w[j])
        neg, pos = sum(A[:n_neg]), sum(A[n_neg:])
        v = []
        for c in range(C):
            pull = sum(A[j] * neg * (y[j][c] - x[i][c]) for j in range(n_neg, T))
            push = sum(A[j] * pos * (y[j][c] - x[i][c]) for j in range(n_neg))
            v.append(pull - push)
        V.append(v)
    return V


def slow_loss(x, y_pos, y_unc, w_unc, taus):
    """The loss and its gradient, with loops, float64."""
    G, N, C = x.shape
    y = torch.cat([x, y_unc, y_pos], 1).tolist()
    w = torch.cat([torch.ones(G, N), w_unc, torch.ones(y_pos.shape[:2])], 1).tolist()
    n_neg, x = N + y_unc.shape[1], x.tolist()
    distances, count, mass = 0, 0, 0
    for g in range(G):
        for i in range(N):
            for j in range(len(y[g])):
                distances += max(math.dist(x[g][i], y[g][j]), 1e-4) * w[g][j]
                count += 1
        mass += sum(w[g])
    scale = (distances / count) / (mass / (count / N))
    s = scale / math.sqrt(C)
    total = np.zeros((G, N, C))
    for tau in taus:
        V = [slow_field(x[g], y[g], n_neg, tau * scale, w[g]) for g in range(G)]
        V = np.array(V) / s
        total += V / math.sqrt((V**2).mean())
    return (total**2).mean(), torch.from_numpy(-2 * total / s / total.size)


def test_loss_and_gradient_equal_plain_loops():
    args = problem()
    loss, grad, _ = loss_and_grad(*args, taus=(0.1, 0.3))
    slow, slow_grad = slow_loss(*args, taus=(0.1, 0.3))
    assert abs(loss.item() / slow - 1) < 1e-9
    assert relative(grad, slow_grad) < 1e-9


def test_field_equals_plain_loops():
    x, y_pos, y_unc, _ = (t[0] for t in problem())
    V = drift_field(x, y_pos, torch.cat([x, y_unc]), 0.7, mask_self=True)
    y = torch.cat([x, y_unc, y_pos]).tolist()
    slow = slow_field(x.tolist(), y, len(x) + len(y_unc), 0.7, [1.0] * len(y))
    assert relative(V, torch.tensor(slow, dtype=torch.float64)) < 1e-9


@pytest.mark.parametrize("case", GOLDEN["names"])
def test_official_numbers(case):
    """Loss, gradient, scale and drift of the authors' JAX code."""

    def get(key):
        key = f"{case}/{key}"
        return torch.from_numpy(GOLDEN[key]) if key in GOLDEN else None

    args = [get(name) for name in ("gen", "fixed_pos", "fixed_neg", "weight_neg")]
    loss, grad, stats = loss_and_grad(*args, taus=get("R_list").tolist(), floor=1e-6)
    off = abs(loss.item() / get("loss").mean().item() - 1), relative(grad, get("grad"))
    print(f"\n{case:22s} relative error: loss {off[0]:.1e}, gradient {off[1]:.1e}", end="")
    assert off[0] < 1e-4 and off[1] < 1e-3
    assert abs(stats["scale"].item() / get("scale").item() - 1) < 1e-4
    assert relative(stats["drift"], get("loss_R")) < 1e-4


# What the paper argues from


def test_antisymmetry():
    x, p, q = torch.randn(2, 8, 3), torch.randn(2, 7, 3) + 1, torch.randn(2, 9, 3)
    V = drift_field(x, p, q, 0.5)
    assert V.norm() > 0.1
    torch.testing.assert_close(V, -drift_field(x, q, p, 0.5))


def test_no_drift_when_positives_are_the_negatives():
    x, y = torch.randn(2, 8, 3), torch.randn(2, 7, 3)
    assert drift_field(x, y, y, 0.5).abs().max() < 1e-6
    assert drift_field(x, y + 0.1, y, 0.5).abs().max() > 1e-2


def test_no_gradient_through_the_target():
    x, y_pos, y_unc, _ = problem()
    y_pos.requires_grad_()
    y_unc.requires_grad_()
    loss, grad, stats = loss_and_grad(x, y_pos, y_unc)
    assert y_pos.grad is None and y_unc.grad is None
    s = stats["scale"] / x.shape[-1] ** 0.5
    V = -grad * s * x.numel() / 2  # what the gradient says the drift was, if it is a constant
    assert V.square().mean().item() == pytest.approx(loss.item(), rel=1e-9)


def test_sinkhorn_steps_make_the_affinity_doubly_stochastic():
    dist = drift.distance(torch.randn(1, 8, 2), torch.randn(1, 8, 2))
    off = []
    for iters in (1, 5, 100):
        A = drift.affinity(dist, 0.5, iters=iters)
        off.append((A.sum(-1) - 1).abs().max().item())
    assert off[0] > off[1] > off[2] and off[2] < 1e-3


def test_scaling_and_shifting_the_features_changes_nothing():
    x, y_pos, y_unc, w_unc = problem()
    loss, grad, stats = loss_and_grad(x, y_pos, y_unc, w_unc)
    moved = loss_and_grad(50 * x + 7, 50 * y_pos + 7, 50 * y_unc + 7, w_unc)
    assert moved[0] == pytest.approx(loss.item(), rel=1e-3)  # but for the 1e-4 of self-distances
    assert relative(moved[1] * 50, grad) < 1e-3
    assert moved[2]["scale"] == pytest.approx(50 * stats["scale"].item(), rel=1e-3)


def test_kernel_width_does_not_depend_on_the_number_of_channels():
    def pad(t, C):  # the same cloud in more channels
        return torch.cat([t, t.new_zeros(*t.shape[:2], C - 4)], dim=-1)

    x, y_pos = torch.randn(2, 16, 4), torch.randn(2, 16, 4)
    few, many = drift_loss(x, y_pos)[1], drift_loss(pad(x, 400), pad(y_pos, 400))[1]
    torch.testing.assert_close(few, many)
    sizes = []
    for C in (4, 400):
        dist = drift.distance(pad(x, C), pad(y_pos, C))
        scale = drift_loss(pad(x, C), pad(y_pos, C))[1]["scale"]
        A = drift.affinity(dist, 0.2 * scale)
        # the effective sample size of the positives: neither one-hot nor uniform, as it would be
        # with a factor sqrt(C) off
        sizes.append((A.sum(-1) ** 2 / A.square().sum(-1)).mean().item())
        assert 1.5 < sizes[-1] < 12
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)


# Guidance, and many features at once


def test_guidance_weight_follows_the_label():
    """In a step, only groups whose alpha is above 1 are pushed away from unconditional images."""
    L, N, P, U, places, C = 2, 4, 3, 3, 2, 5
    alpha = torch.tensor([1.0, 3.0])
    x, pos, unc = (torch.randn(L * n, places, C) for n in (N, P, U))
    pos += 1
    x.requires_grad_()
    loss, stats = drift.features_loss({"f": x}, {"f": pos}, {"f": unc}, alpha)
    loss.backward()
    groups = [[], [], []]
    for label in range(L):
        for place in range(places):
            for group, y, n in zip(groups, (x.detach(), pos, unc), (N, P, U), strict=True):
                group.append(y[label * n : (label + 1) * n, place])
    x_g, y_pos, y_unc = map(torch.stack, groups)
    weight = torch.tensor([0.0, 0.0, 2.0, 2.0])  # (alpha - 1) (N - 1) / U
    expected, grad, of_loss = loss_and_grad(x_g, y_pos, y_unc, weight[:, None].repeat(1, U))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    grad = grad.view(L, places, N, C).transpose(1, 2).reshape(L * N, places, C)
    assert relative(x.grad, grad) < 1e-5
    torch.testing.assert_close(stats["f"][:-1], of_loss["drift"])
    torch.testing.assert_close(stats["f"][-1], of_loss["scale"])


def test_a_step_adds_the_losses_of_its_features():
    """Features of several shapes."""
    fx, fp, fu = {}, {}, {}
    for name, shape in dict(a=(1, 6), b=(4, 3), c=(1, 6), d=(4, 3), e=(2, 3)).items():
        for f, n in ((fx, 8), (fp, 6), (fu, 4)):
            f[name] = torch.randn(n, *shape, dtype=torch.float64)
    alpha = torch.tensor([1.5, 3.0], dtype=torch.float64)
    loss, stats = drift.features_loss(fx, fp, fu, alpha)
    each = [drift.features_loss({k: fx[k]}, {k: fp[k]}, {k: fu[k]}, alpha) for k in fx]
    assert loss.item() == pytest.approx(sum(one.item() for one, _ in each), rel=1e-12)
    torch.testing.assert_close(stats, {k: v for _, one in each for k, v in one.items()})


# The authors' networks


def test_official_generator():
    """Samples, intermediate tensors and every parameter's gradient of the authors' code."""
    needs("msgpack")
    model, seen = convert.load_generator(ASSETS / "artifact_gen"), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))

    def get(key):
        return torch.from_numpy(GOLDEN_DIT[key])

    label, style, alpha = get("a/c").long(), get("a/noise_labels").long(), get("a/cfg_scale")
    noise = get("a/x").permute(0, 3, 1, 2)
    images = model(noise, style, label, alpha).permute(0, 2, 3, 1)
    q_norm = "blocks.0.attn.q_norm"
    seen[q_norm] = seen[q_norm].transpose(1, 2)  # heads after tokens
    off = {
        "samples": relative(images, get("a/samples")),
        "cond": relative(model.condition(style, label, alpha), get("a/cond")),
        "alpha_norm": relative(seen["alpha_norm"], get("a/cfg_normed_embedding")),
    }
    names = {
        "TorchLinear_0": "patch_embed",
        "TorchLinear_1": "cls_proj",
        "FinalLayer_0": "final_proj",
        "blocks_0": "blocks.0",
        "blocks_1": "blocks.1",
        "blocks_2": "blocks.2",
        "blocks_0/RMSNorm_0": "blocks.0.norm1",
        "blocks_0/RMSNorm_1": "blocks.0.norm2",
        "blocks_0/Attention_0": "blocks.0.attn",
        "blocks_0/Attention_0/q_norm": q_norm,
        "blocks_0/SwiGLUFFN_0": "blocks.0.mlp",
    }
    prefix = "a/inter/LightningDiT_0/"
    there = [key for key in GOLDEN_DIT.files if key.startswith("a/inter")]
    assert {key.removeprefix(prefix) for key in there} == set(names)
    off |= {ours: relative(seen[ours][:1], get(prefix + name)) for name, ours in names.items()}

    (images * get("a/cotangent")).sum().backward()
    norms = GOLDEN_DIT["a/gradnorm_names"].tolist(), GOLDEN_DIT["a/gradnorms"].tolist()
    norms = dict(zip(*norms, strict=True))
    grad_off = {}
    for name, parameter in model.named_parameters():
        keys, _ = convert.generator_key(name, model.config)
        for key, grad in zip(keys, parameter.grad.chunk(len(keys)), strict=True):
            grad_off[key] = abs(grad.norm().item() / norms.pop(key) - 1)
    assert not norms and len(grad_off) == 69
    print(f"\n{len(off)} tensors, largest relative error {max(off.values()):.1e}", end="")
    print(f"; {len(grad_off)} gradient norms, {max(grad_off.values()):.1e}", end="")
    assert max(off.values()) < 1e-4 and max(grad_off.values()) < 1e-3
    with torch.no_grad():
        images = model(noise, style, label, torch.full_like(alpha, 1.5)).permute(0, 2, 3, 1)
    assert relative(images, get("a/samples_cfg_scalar_1.5")) < 1e-4


@pytest.mark.parametrize("case", ["act", "act_small"])
def test_official_mae_features(case):
    """All 85 features; the small input, of a variance near the norms' eps, finds a wrong eps."""
    images = GOLDEN_MAE["A/x" if case == "act" else "A/x_small"]
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    feats = features.multiscale(our_mae().features(images))
    prefix = f"A/{case}/"
    names = [key.removeprefix(prefix) for key in GOLDEN_MAE.files if key.startswith(prefix)]
    assert len(feats) == 85 and (set(names) == set(feats) if case == "act" else len(names) == 7)
    off = {k: relative(feats[k], torch.from_numpy(GOLDEN_MAE[prefix + k])) for k in names}
    print(f"\n{case}: {len(off)} names, largest relative error {max(off.values()):.1e}", end="")
    assert max(off.values()) < 1e-4, off


# Training


def run(*args):
    train.main([*map(str, args), "--device", "cpu"])


def read(path):
    return torch.load(path, weights_only=True)


def weights(path):
    """All weights of a checkpoint, trained and averaged, as one vector."""
    state = read(path)
    return torch.cat([v.flatten() for part in ("model", "ema") for v in state[part].values()])


def test_digits_are_learnt(tmp_path, capsys):
    plan = ["--steps", 75, "--eval_every", 25, "--ema", 0.9, "--n_gen", 16, "--n_pos", 16]
    run("--out", tmp_path / "a.pt", *plan)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    fd = [float(line[line.index("fd") + 1]) for line in lines if "fd" in line]
    print("\nfd", fd, end="")
    assert len(fd) == 3 and fd[-1] < 0.5 * fd[0], fd
    keys = {"model", "ema", "optimizers", "args", "config", "classes", "step"}
    assert keys <= read(tmp_path / "a.pt").keys()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.pt", "a.png", "a.jsonl"}


def test_resume_equals_uninterrupted(tmp_path):
    plan = [*QUICK, "--steps", 6, "--eval_every", 2]
    run(*plan, "--out", tmp_path / "whole.pt")
    run(*plan, "--out", tmp_path / "half.pt", "--stop_after", 3)
    assert read(tmp_path / "half.pt")["step"] == 3
    assert not torch.equal(weights(tmp_path / "half.pt"), weights(tmp_path / "whole.pt"))
    run("--resume", tmp_path / "half.pt", "--stop_after", 0)
    assert torch.equal(weights(tmp_path / "half.pt"), weights(tmp_path / "whole.pt"))


def test_micro_batches_give_the_same_weights(tmp_path):
    """After 3 steps in float64, in parts that cut through labels."""
    torch.set_default_dtype(torch.float64)
    plan = [*QUICK, "--steps", 3, "--warmup", 0, "--encoder", "pixels", "pool:2", "--out"]
    run(*plan, tmp_path / "whole.pt")
    run(*plan, tmp_path / "parts.pt", "--micro_batch", 13)
    off = relative(weights(tmp_path / "parts.pt"), weights(tmp_path / "whole.pt"))
    print(f"\nweights of micro-batches against one batch, relative: {off:.1e}", end="")
    assert off < 1e-9


SMALL = """
import sys, torch, train
torch.set_default_dtype(torch.float64)
train.N_EVAL = 50
train.main(sys.argv[1:])
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_two_ranks_take_the_same_steps(tmp_path):
    """The same weights after 3 steps in float64, one of both cut into micro-batches."""
    (tmp_path / "small.py").write_text(SMALL)
    plan = [tmp_path / "small.py", *QUICK, "--steps", 3, "--warmup", 0, "--out"]
    for command in ([*plan, "one.pt"], [*TORCHRUN, *plan, "two.pt", "--micro_batch", 9]):
        job = start(*command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        out = job.communicate(timeout=300)[0]
        assert job.returncode == 0, out
    assert "2 x cpu" in out
    off = relative(weights(tmp_path / "two.pt"), weights(tmp_path / "one.pt"))
    print(f"\nweights of 2 ranks against 1, relative: {off:.1e}", end="")
    assert off < 1e-9


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_a_stopped_run_leaves_a_whole_checkpoint(tmp_path, number):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the run would inherit to ignore it
    (tmp_path / "small.py").write_text(SMALL)
    command = ["small.py", *QUICK, "--eval_every", 2, "--steps", 5000]
    with start(*command, cwd=tmp_path, stdout=subprocess.DEVNULL) as job:
        while not (tmp_path / "out.png").exists():
            time.sleep(0.1)
        job.send_signal(number)
        assert job.wait(60) == (0 if number == signal.SIGHUP else -number)
    step = read(tmp_path / "out.pt")["step"]
    torch.set_default_dtype(torch.float64)
    run("--resume", tmp_path / "out.pt", "--stop_after", step + 1)
    assert read(tmp_path / "out.pt")["step"] == step + 1


# What a user gets wrong


@pytest.mark.parametrize(
    "line, flags",
    [
        ("no data set digit", ["--dataset", "digit"]),
        ("unrecognized arguments: --nonsense", ["--nonsense"]),
        ("--steps 0 must be 1 to", ["--steps", 0]),
        ("--lr nan must be", ["--lr", "nan"]),
        ("images of 8 pixels have no patches of 3", ["--patch", 3]),
        ("no encoder dinoo", ["--encoder", "dinoo"]),
        ("there is no checkpoint none.pt", ["--resume", "none.pt"]),
        ("there are tiny, S, B, L", ["--model", "XL"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, line, flags):
    out = tmp_path / "keep.pt"
    out.write_text("precious")
    with pytest.raises(SystemExit) as stop:
        run("--out", out, *flags)
    message = capsys.readouterr().err.strip() if stop.value.code == 2 else stop.value.code
    assert line in message.splitlines()[-1] and stop.value.code != 0
    assert out.read_text() == "precious" and [*tmp_path.iterdir()] == [out]
