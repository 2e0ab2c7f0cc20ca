"""
What is proven, in less than a minute on two cores, without a network or a GPU:

    the drift field and the loss    equal plain loops, and the authors' JAX code, number by number;
                                    and they have the properties that the paper argues from
    the generator, the encoder      equal the authors' JAX code, on weights that it has written
    the real images of a step       are of the right class, each once
    FID                             is that of Gaussians whose distance is known
    training                        learns digits; resumed, in parts or on two ranks, it takes the
                                    same steps
    what a user gets wrong          is one line

$ python -m pytest -q           # this file
$ python -m pytest -q -s        # and with the errors that were measured
$ python -m pytest -q --all     # and tests/: every script, file and flag, kills, full disks, ...
"""

import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

import data
import drift
import features
import fid
import official
from conftest import (
    ARTIFACT,
    ASSETS,
    QUICK,
    TYPED,
    fails,
    first_gradient,
    loss_and_grad,
    needs,
    official_generator,
    problem,
    python,
    read,
    relative,
    run,
    torchrun,
    train,
    weights,
    write_artifact,
)
from drift import drift_field, drift_loss
from mae import MAE

# Computed with the authors' JAX code
GOLDEN = np.load(ASSETS / "golden_drift.npz")
GOLDEN_DIT = np.load(ASSETS / "golden_generator.npz")
GOLDEN_MAE = np.load(ASSETS / "golden_mae.npz")


# The field and the loss, against plain loops


def log_sum_exp(values):
    most = max(values)
    return most + math.log(sum(math.exp(v - most) for v in values))


def slow_field(x, y, n_neg, tau, w):
    """Algorithm 2 for one group, V [N, C], with loops over lists; the first N rows of y are x."""
    N, T, C = len(x), len(y), len(x[0])
    logit = [[-math.dist(x[i], y[j]) / tau if i != j else -1e6 for j in range(T)] for i in range(N)]
    row = [log_sum_exp(logit[i]) for i in range(N)]
    col = [log_sum_exp([logit[i][j] for i in range(N)]) for j in range(T)]
    V = []
    for i in range(N):
        A = []
        for j in range(T):
            softmax_y, softmax_x = math.exp(logit[i][j] - row[i]), math.exp(logit[i][j] - col[j])
            A.append(math.sqrt(softmax_y * softmax_x) * w[j])
        neg, pos = sum(A[:n_neg]), sum(A[n_neg:])
        v = []
        for c in range(C):
            pull = sum(A[j] * neg * (y[j][c] - x[i][c]) for j in range(n_neg, T))
            push = sum(A[j] * pos * (y[j][c] - x[i][c]) for j in range(n_neg))
            v.append(pull - push)
        V.append(v)
    return V


def slow_loss(x, y_pos, y_unc, w_unc, w_pos, w_gen, taus):
    """The loss and its gradient, with loops, float64."""
    G, N, C = x.shape
    y = torch.cat([x, y_unc, y_pos], 1).tolist()
    w = torch.cat([w_gen, w_unc, w_pos], 1).tolist()
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
    x, y_pos, y_unc, w_unc, *_ = (t[0] for t in problem())
    w = torch.cat([torch.ones(len(x)), w_unc]).double()
    V = drift_field(x, y_pos, torch.cat([x, y_unc]), 0.7, w_neg=w, mask_self=True)
    y = torch.cat([x, y_unc, y_pos]).tolist()
    slow = slow_field(x.tolist(), y, len(w), 0.7, w.tolist() + [1.0] * len(y_pos))
    assert relative(V, torch.tensor(slow, dtype=torch.float64)) < 1e-9


@pytest.mark.parametrize("case", GOLDEN["names"])
def test_official_numbers(case):
    """Loss, gradient, scale and drift of the authors' JAX code."""

    def get(key):
        key = f"{case}/{key}"
        return torch.from_numpy(GOLDEN[key]) if key in GOLDEN else None

    names = ("gen", "fixed_pos", "fixed_neg", "weight_neg", "weight_pos", "weight_gen")
    args = [get(name) for name in names]
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
    x, y_pos, y_unc, *_ = problem()
    y_pos.requires_grad_()
    y_unc.requires_grad_()
    loss, grad, stats = loss_and_grad(x, y_pos, y_unc)
    assert y_pos.grad is None and y_unc.grad is None
    s = stats["scale"] / x.shape[-1] ** 0.5
    V = -grad * s * x.numel() / 2  # what the gradient says the drift was, if it is a constant
    assert V.square().mean().item() == pytest.approx(loss.item(), rel=1e-9)


def test_collapsed_samples_are_pushed_apart_and_far_ones_pulled_in():
    real = torch.randn(1, 64, 2)
    collapsed = 0.01 * torch.randn(1, 64, 2)
    step = -loss_and_grad(collapsed, real)[1]
    outward = collapsed - collapsed.mean(1, keepdim=True)
    assert ((step - step.mean(1, keepdim=True)) * outward).sum() > 0
    far = torch.randn(1, 64, 2) + 10
    assert (-loss_and_grad(far, real)[1].mean(1) < 0).all()


def test_the_floor_pulls_everything_to_the_mean():
    """Two far clusters, samples and data alike: without the floor no sample feels the other one."""
    mode = torch.tensor([[-10.0, 0.0], [10.0, 0.0]]).repeat(32, 1)
    x, y = mode + torch.randn(64, 2), mode + torch.randn(64, 2)

    def pull(floor):
        V = drift_field(x, y, x, 0.1, mask_self=True, floor=floor)
        return abs((V * -mode.sign())[:, 0].mean().item())

    assert pull(0.0) < 0.05 * pull(1e-4)


def test_sinkhorn_steps_make_the_affinity_doubly_stochastic():
    dist = drift.distance(torch.randn(1, 8, 2), torch.randn(1, 8, 2))
    off = []
    for iters in (1, 5, 100):
        A = drift.affinity(dist, 0.5, iters=iters)
        off.append((A.sum(-1) - 1).abs().max().item())
    assert off[0] > off[1] > off[2] and off[2] < 1e-3
    expected = ((-dist / 0.5).softmax(-1) * (-dist / 0.5).softmax(-2)).sqrt()
    torch.testing.assert_close(drift.affinity(dist, 0.5), expected)


def test_scaling_and_shifting_the_features_changes_nothing():
    x, y_pos, y_unc, w_unc, *_ = problem()
    loss, grad, stats = loss_and_grad(x, y_pos, y_unc, w_unc)
    moved = loss_and_grad(50 * x + 7, 50 * y_pos + 7, 50 * y_unc + 7, w_unc)
    assert moved[0] == pytest.approx(loss.item(), rel=1e-3)  # but for the 1e-4 of self-distances
    assert relative(moved[1] * 50, grad) < 1e-3
    assert moved[2]["scale"] == pytest.approx(50 * stats["scale"].item(), rel=1e-3)


def test_far_off_features_keep_their_digits():
    x, y_pos = torch.randn(1, 16, 64), torch.randn(1, 16, 64)
    far = loss_and_grad(x + 1000, y_pos + 1000)[1]
    assert relative(far, loss_and_grad(x, y_pos)[1]) < 1e-2


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


def test_alpha_one_leaves_only_the_softmax_mass():
    x, y_pos, y_unc, *_ = problem()
    zero, ones = x.new_zeros(y_unc.shape[:2]), [x.new_ones(t.shape[:2]) for t in (y_pos, x)]
    with_mass = loss_and_grad(x, y_pos, y_unc, zero)
    without = loss_and_grad(x, y_pos)
    # weight 0: not in the mean distance
    assert with_mass[2]["scale"] == pytest.approx(without[2]["scale"].item())
    slow, slow_grad = slow_loss(x, y_pos, y_unc, zero, *ones, taus=drift.TAUS)
    assert with_mass[0].item() == pytest.approx(slow, rel=1e-6)
    assert relative(with_mass[1], slow_grad) < 1e-6
    assert relative(with_mass[1], without[1]) > 1e-3  # the mass is there,
    nobody = loss_and_grad(x, y_pos, y_unc + 1e3, zero)
    assert relative(nobody[1], without[1]) < 1e-6  # and only that


def test_guidance_reaches_the_gradient():
    x, y_pos, y_unc, *_ = problem()
    low, high = (
        loss_and_grad(x, y_pos, y_unc, x.new_full(y_unc.shape[:2], w))[1] for w in (0.0, 3.0)
    )
    assert relative(high, low) > 0.05


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
    assert (
        relative(x.grad, grad.view(L, places, N, C).transpose(1, 2).reshape(L * N, places, C))
        < 1e-5
    )
    torch.testing.assert_close(stats["f"][:-1], of_loss["drift"])
    torch.testing.assert_close(stats["f"][-1], of_loss["scale"])
    even = loss_and_grad(x_g, y_pos, y_unc, torch.full((L * places, U), 2.0))
    assert relative(even[1], grad) > 1e-2  # it does matter whose weight it is


def test_features_of_one_shape_at_once_give_the_sum_of_their_losses():
    x, y_pos, y_unc, *w = problem()
    factor = torch.tensor([1.0, 3.0, 0.2]).double()[:, None, None, None]
    args = [factor * y + 0.1 * torch.randn(3, *y.shape).double() for y in (x, y_pos, y_unc)]
    loss, grad, stats = loss_and_grad(*args, *w)
    each = [loss_and_grad(*(y[f] for y in args), *w) for f in range(3)]
    assert loss.item() == pytest.approx(sum(one[0].item() for one in each), rel=1e-12)
    assert relative(grad, torch.stack([one[1] for one in each])) < 1e-12
    assert stats["scale"].shape == (3,) and stats["drift"].shape == (3, len(drift.TAUS))
    for key in ("scale", "drift"):
        torch.testing.assert_close(stats[key], torch.stack([one[2][key] for one in each]))


def test_a_step_adds_the_losses_of_its_features():
    """Features of several shapes; and parts of the samples, whose drift is a constant, add up."""
    fx, fp, fu = {}, {}, {}
    for name, shape in dict(a=(1, 6), b=(4, 3), c=(1, 6), d=(4, 3), e=(2, 3)).items():
        for f, n in ((fx, 8), (fp, 6), (fu, 4)):
            f[name] = torch.randn(n, *shape, dtype=torch.float64)
    alpha = torch.tensor([1.5, 3.0], dtype=torch.float64)
    loss, stats = drift.features_loss(fx, fp, fu, alpha)
    each = [drift.features_loss({k: fx[k]}, {k: fp[k]}, {k: fu[k]}, alpha) for k in fx]
    assert loss.item() == pytest.approx(sum(one.item() for one, _ in each), rel=1e-12)
    torch.testing.assert_close(stats, {k: v for _, one in each for k, v in one.items()})
    V, weight, _ = drift.features_drift(fx, fp, fu, alpha)
    parts = [
        drift.regress({k: f[i : i + 3] for k, f in fx.items()}, V[i : i + 3], weight)
        for i in (0, 3, 6)
    ]
    assert loss.item() == pytest.approx(sum(parts).item(), rel=1e-12)


def test_autocast_does_not_reach_the_drift():
    x, y_pos = torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    plain = loss_and_grad(x, y_pos)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss_and_grad(x, y_pos)[1], plain[1])
        assert drift_field(x.bfloat16(), y_pos, x, 0.5).dtype == torch.float32


# The authors' networks


def test_official_generator():
    """Samples, intermediate tensors and every parameter's gradient of the authors' code."""
    model, seen = official_generator(), {}
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
        keys, _ = official.generator_key(name, model.config)
        for key, grad in zip(keys, parameter.grad.chunk(len(keys)), strict=True):
            grad_off[key] = abs(grad.norm().item() / norms.pop(key) - 1)
    assert not norms and len(grad_off) == 69
    print(f"\n{len(off)} tensors, largest relative error {max(off.values()):.1e}", end="")
    print(f"; {len(grad_off)} gradient norms, {max(grad_off.values()):.1e}", end="")
    assert max(off.values()) < 1e-4 and max(grad_off.values()) < 1e-3
    with torch.no_grad():
        images = model(noise, style, label, torch.full_like(alpha, 1.5)).permute(0, 2, 3, 1)
    assert relative(images, get("a/samples_cfg_scalar_1.5")) < 1e-4


def official_mae(folder):
    """The encoder of the golden file, from an artifact in which everything else is random."""
    prefix = "A/params/"
    there = [key for key in GOLDEN_MAE.files if key.startswith(prefix)]
    arrays = {key.removeprefix(prefix): GOLDEN_MAE[key] for key in there}
    shapes = {
        "decoder/bridge/conv": (3, 3, 64, 64),
        "decoder/bridge/gn": (64,),
        "decoder/head": (1, 1, 8, 3),
        "fc": (64, 11),
    }
    ups = (("up43", 32, 64, 32), ("up32", 16, 32, 16), ("up21", 8, 16, 8), ("up10", 8, 8, 8))
    for up, skip, c_in, c_out in ups:
        shapes |= {
            f"decoder/{up}/concat_norm_fn": (c_in + skip,),
            f"decoder/{up}/proj/gn": (c_out,),
            f"decoder/{up}/proj/conv": (3, 3, c_in + skip, c_out),
            f"decoder/{up}/refine/gn": (c_out,),
            f"decoder/{up}/refine/conv": (3, 3, c_out, c_out),
        }
    for name, shape in shapes.items():
        kind = "scale" if len(shape) == 1 else "kernel"
        arrays[f"{name}/{kind}"] = np.random.randn(*shape).astype(np.float32)
        if len(shape) == 1 or name in ("fc", "decoder/head"):
            arrays[f"{name}/bias"] = np.random.randn(shape[-1]).astype(np.float32)
    config = dict(num_classes=11, in_channels=3, base_channels=8, patch_size=2, dropout_prob=0.0)
    config |= dict(layers=[3, 4, 6, 3], use_bf16=False, input_patch_size=1)
    write_artifact(folder, "mae", config, arrays)
    return MAE.from_official(folder)


@pytest.mark.parametrize("case", ["act", "act_small"])
def test_official_mae_features(case, tmp_path):
    """All 85 features; the small input, of a variance near the norms' eps, finds a wrong eps."""
    images = GOLDEN_MAE["A/x" if case == "act" else "A/x_small"]
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    feats = features.multiscale(official_mae(tmp_path).features(images))
    prefix = f"A/{case}/"
    names = [key.removeprefix(prefix) for key in GOLDEN_MAE.files if key.startswith(prefix)]
    assert len(feats) == 85 and (set(names) == set(feats) if case == "act" else len(names) == 7)
    off = {k: relative(feats[k], torch.from_numpy(GOLDEN_MAE[prefix + k])) for k in names}
    print(f"\n{case}: {len(off)} names, largest relative error {max(off.values()):.1e}", end="")
    assert max(off.values()) < 1e-4, off


def test_multiscale_of_a_map_by_hand():
    f = torch.randn(2, 3, 4, 6)
    feats = features.multiscale({"f": f, "token": torch.randn(2, 1, 5)})
    shapes = {name: tuple(v.shape[1:]) for name, v in feats.items()}
    assert shapes == {
        "f": (24, 3),
        "f_mean": (1, 3),
        "f_std": (1, 3),
        "f_mean_2": (6, 3),
        "f_std_2": (6, 3),
        "token": (1, 5),
    }

    def std(patch):
        return (patch.var(correction=0) + 1e-6).sqrt()

    torch.testing.assert_close(feats["f"][1, 7, 2], f[1, 2, 1, 1])  # row 1, column 1
    patch = f[1, 2, 2:4, 4:6]  # row 1, column 2
    torch.testing.assert_close(feats["f_mean_2"][1, 5, 2], patch.mean())
    torch.testing.assert_close(feats["f_std_2"][1, 5, 2], std(patch))
    torch.testing.assert_close(feats["f_mean"][0, 0, 1], f[0, 1].mean())
    torch.testing.assert_close(feats["f_std"][0, 0, 1], std(f[0, 1]))


# Data, and the distance of sets of images


def test_sampler_draws_by_label_without_replacement():
    labels = torch.tensor([0] * 5 + [1] * 50 + [2] * 9)[torch.randperm(64)]
    images = torch.arange(64, dtype=torch.uint8).view(-1, 1, 1, 1)  # every image says its index
    sampler = data.Sampler(images, labels, "cpu")
    wanted, g = torch.tensor([2, 0, 1, 0]), torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(50):
        drawn = sampler.draw(wanted, 5, 20, g)
        pos, unc = (data.to_uint8(t).flatten(1).long() for t in drawn)
        assert (labels[pos] == wanted[:, None]).all()
        assert all(len(set(row)) == 5 for row in pos.tolist())
        seen |= set(pos.flatten().tolist())
    assert seen == set(range(64)) and set(labels[unc].flatten().tolist()) == {0, 1, 2}
    state = g.get_state()
    whole = sampler.draw(wanted, 5, 3, g)
    for i in range(4):  # what a label gets does not depend on who else draws
        g.set_state(state)
        share = sampler.draw(wanted, 5, 3, g, slice(i, i + 1))
        for part, all_ in zip(share, whole, strict=True):
            assert torch.equal(part, all_[i : i + 1])


def test_frechet_distance_of_known_gaussians():
    def distance(a, b):
        return fid.frechet_distance(*fid.gaussian(a), *fid.gaussian(b))

    a, b = torch.randn(200000, 2), torch.randn(200000, 2) * torch.tensor([2.0, 1.0]) + 3
    assert distance(a, b) == pytest.approx(3**2 * 2 + (2 - 1) ** 2, rel=0.02)
    assert abs(distance(a, a)) < 1e-6
    mean_a, mean_b = torch.tensor([[1.0, 2.0], [0.0, 4.0]]).double()
    cov_a, cov_b = torch.tensor([[[2.0, 0.6], [0.6, 1.0]], [[1.0, -0.3], [-0.3, 3.0]]]).double()
    val, vec = torch.linalg.eig(cov_a @ cov_b)  # the definition, not symmetrised
    root = (vec @ torch.diag(val.sqrt()) @ torch.linalg.inv(vec)).real
    exact = 5 + cov_a.trace() + cov_b.trace() - 2 * root.trace()
    found = fid.frechet_distance(mean_a, cov_a, mean_b, cov_b)
    assert found == pytest.approx(exact.item(), rel=1e-9)
    few = torch.randn(10, 50)  # singular
    assert abs(distance(few, few)) < 1e-4 and distance(few, few + 1) == pytest.approx(50, rel=1e-5)


# Training


def test_a_few_steps_lower_the_frechet_distance(monkeypatch, tmp_path, capsys):
    plan = ["--steps", 75, "--eval_every", 25, "--ema", 0.9, "--n_gen", 16, "--n_pos", 16]
    plan += ["--device", "cpu"]
    run(monkeypatch, "train.py", "--out", tmp_path / "a.pt", *plan)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "at alpha 1" in line]
    fd = [float(line.split("fd ")[1].split()[0]) for line in lines]
    print("\nfd", fd, end="")
    assert len(fd) == 3 and fd[-1] < 0.5 * fd[0], fd
    assert out.count("(1000 at alpha 1, against 1797 real)") == 3
    checkpoint = read(tmp_path / "a.pt")
    assert {"model", "ema", "optimizer", "step", "args"} <= set(checkpoint)
    assert checkpoint["step"] == 75
    names = [*checkpoint["model"], *checkpoint["ema"]]
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in names)
    assert Image.open(tmp_path / "samples.png").size[0] > 300


def test_resume_equals_uninterrupted(tmp_path):
    plan = [*QUICK, "--steps", 6, "--eval_every", 2]
    train(*plan, "--out", tmp_path / "whole.pt")
    train(*plan, "--out", tmp_path / "half.pt", "--stop_after", 3)
    assert read(tmp_path / "half.pt")["step"] == 3
    assert not torch.equal(weights(tmp_path / "half.pt"), weights(tmp_path / "whole.pt"))
    train("--resume", tmp_path / "half.pt")
    assert torch.equal(weights(tmp_path / "half.pt"), weights(tmp_path / "whole.pt"))


def test_micro_batches_give_the_same_gradient(tmp_path, checkpoint):
    """Cut between labels, within labels and one by one, in float64."""
    torch.set_default_dtype(torch.float64)
    plan = [*QUICK, "--init", checkpoint, "--steps", 1, "--warmup", 0, "--out"]
    train(*plan, tmp_path / "whole.pt")
    whole = first_gradient(tmp_path / "whole.pt")
    assert whole.dtype == torch.float64 and whole.norm() > 0
    for size in (16, 13, 1):
        train(*plan, tmp_path / f"{size}.pt", "--micro_batch", size)
        assert relative(first_gradient(tmp_path / f"{size}.pt"), whole) < 1e-9, size


def test_two_ranks_take_the_same_steps(tmp_path):
    """The same weights after 3 steps in float64, one of both cut into micro-batches."""
    plan = [*QUICK, "--steps", "3", "--warmup", "0", "--out"]
    (tmp_path / "typed.py").write_text(TYPED)
    script = [str(tmp_path / "typed.py"), "float64", "train.py", *plan]
    one, two = str(tmp_path / "one.pt"), str(tmp_path / "two.pt")
    for command in ([*script, one], [*torchrun(2), *script, two, "--micro_batch", "9"]):
        status, out, err = python(*command)
        assert status == 0, err
    assert "2 x cpu" in out
    off = relative(weights(two), weights(one))
    print(f"\nweights of 2 ranks against 1, relative: {off:.1e}", end="")
    assert weights(one).dtype == torch.float64 and off < 1e-9


# What a user gets wrong


@pytest.mark.parametrize(
    "line, flags",
    [
        ("unknown data set 'digit'", ["--dataset", "digit"]),
        ("there is no folder nowhere", ["--dataset", "folder:nowhere"]),
        ("class '8' has 174 images, and a step draws 175", ["--n_pos", 175]),
        ("unrecognized arguments: --nonsense", ["--nonsense"]),
        ("--device: none is not to be had here", ["--device", "none"]),
        ("--steps: must be from 1", ["--steps", 0]),
        ("--lr: must be from 0", ["--lr", "nan"]),
        ("images of 8 pixels have no patches of 3", ["--patch", 3]),
        ("--pools 3 does not divide the image size", ["--pools", 3]),
        ("unknown encoder 'dinoo': nearest dino", ["--encoder", "dinoo"]),
        ("there is no encoder file none.pt", ["--encoder", "none.pt"]),
        ("there is no checkpoint none.pt", ["--init", "none.pt"]),
        ("cannot resume from none.pt", ["--resume", "none.pt"]),
    ],
)
def test_bad_input_is_one_line(monkeypatch, tmp_path, capsys, line, flags):
    out = tmp_path / "keep.pt"
    out.write_text("precious")
    assert line in fails(monkeypatch, capsys, "train.py", "--out", out, *flags)
    assert out.read_text() == "precious" and os.listdir(tmp_path) == ["keep.pt"]


def test_damaged_weights_are_one_line(monkeypatch, tmp_path, capsys):
    needs("msgpack")
    for file in ARTIFACT.iterdir():
        raw = file.read_bytes()
        (tmp_path / file.name).write_bytes(raw[: len(raw) // 2] if "msgpack" in file.name else raw)
    command = ["sample.py", "--ckpt", tmp_path, "--out", tmp_path / "a.png"]
    assert "is truncated, damaged" in fails(monkeypatch, capsys, *command)
    assert not (tmp_path / "a.png").exists()
