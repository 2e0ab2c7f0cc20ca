"""
The drift field and the loss of "Generative Modeling via Drifting" (arXiv 2602.04770).

    x are generated samples, y_pos are real ones, y_neg are generated ones (often x itself).
    V(x) = attraction of x to y_pos  -  attraction of x to y_neg        Algorithm 2: drift_field()
    loss = | x - stopgrad(x + V(x)) |^2                                 Algorithm 1: drift_loss()

If the generated and the real distribution are the same, the two pulls cancel and V = 0. Training
follows V until then. Algorithm 1 also fixes the units (appendix A.6): see normalised_drift(). A
step of train.py calls features_drift(), which does that for all features at once, and regress().

This file needs torch alone, and pillow for the demo: copy it into your own project. In its shapes F
are features of one shape, G groups (labels x locations), N samples, T their targets, C channels.

Run by itself, it trains a small MLP on two 2-D data sets in seconds and draws drift.gif:
$ python drift.py
$ python drift.py --iters 3 --floor 1e-6  # see what the Sinkhorn steps and the official floor do
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F

TAUS = (0.02, 0.05, 0.2)  # kernel widths, in units of the mean distance


# Algorithm 2: the field


@contextmanager
def exact_float32(device_type):
    """Neither autocast nor TF32: tau divides what is left of a difference of large numbers."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def as_float(x):
    return x if x.dtype == torch.float64 else x.float()


def distance(x, y):
    """Euclidean distances [..., N, T] between the rows of x [..., N, C] and of y [..., T, C].

    At least 1e-4, as officially: rounding can make the square of a small one negative.
    """
    x_squared = x.square().sum(-1).unsqueeze(-1)
    y_squared = y.square().sum(-1).unsqueeze(-2)
    square = (x @ y.mT).mul_(-2).add_(x_squared).add_(y_squared)
    return square.clamp_(min=1e-8).sqrt_()


def affinity(D, tau, mask_self=False, iters=1, floor=0.0):
    """A of Algorithm 2 [..., N, T]: geometric mean of the softmax over y and the softmax over x.

    D [..., N, T] are distances, tau the width of the kernel exp(-D / tau); they are broadcast. With
    mask_self the first N columns are the rows themselves, and no sample sees itself.

    The mean is taken of logarithms. The official code takes sqrt(max(softmax * softmax, 1e-6)), so
    that no pair, however far apart, has an affinity below 1e-3: x is then pulled to the mean of all
    y, and the samples of a class become one. floor=1e-6 reproduces that. iters > 1 repeats the
    averaging, which goes on towards the Sinkhorn coupling of x and y.
    """
    logit = D / -tau
    if mask_self:
        # Finite: with one sample alone in its group, a softmax over x of -inf would be NaN.
        logit.diagonal(dim1=-2, dim2=-1).sub_(1e6)
    for _ in range(iters):
        over_y, over_x = logit.log_softmax(-1), logit.log_softmax(-2)
        logit = torch.lerp(over_y, over_x, 0.5)  # log sqrt(softmax over y * softmax over x)
    A = logit.exp_()
    return A.clamp_(min=floor**0.5) if floor else A


def field_weights(D, w, n_pos, tau, mask_self=False, iters=1, floor=0.0):
    """W of Algorithm 2 [..., N, T], by which V = W @ y; the last n_pos of the targets y are real.

    w [..., T] multiplies the affinities after the softmaxes: a weight scales the force of a target,
    not the mass for which the others compete. The rows of W sum to zero.
    """
    A = affinity(D, tau, mask_self, iters, floor).mul_(w.unsqueeze(-2))
    A_neg, A_pos = A.split([A.shape[-1] - n_pos, n_pos], dim=-1)
    sum_neg = A_neg.sum(-1, keepdim=True)
    sum_pos = A_pos.sum(-1, keepdim=True)
    A_pos.mul_(sum_neg)  # W_pos = A_pos * sum(A_neg), where A_pos was
    A_neg.mul_(-sum_pos)  # -W_neg = -A_neg * sum(A_pos), where A_neg was
    return A


@torch.no_grad()
def drift_field(x, y_pos, y_neg, tau, w_neg=None, mask_self=False, iters=1, floor=0.0):
    """The drift V(x) of Algorithm 2, without any normalisation, [..., N, C] in units of x.

    x [..., N, C], y_pos [..., P, C], y_neg [..., M, C], their weights w_neg [..., M]; tau is a
    distance. mask_self: the first N rows of y_neg are x itself, and no sample repels itself. iters
    and floor: see affinity(). float32, or float64 if x is, whatever autocast says; no gradient.
    """
    with exact_float32(x.device.type):
        y = as_float(torch.cat([y_neg, y_pos], dim=-2))
        w = y.new_ones(y.shape[:-1])
        if w_neg is not None:
            w[..., : w_neg.shape[-1]] = w_neg
        # V sees no shift, but the distances of points far from the origin lose digits.
        centre = as_float(x).mean(-2, keepdim=True)
        y = y - centre
        D = distance(x - centre, y)
        W = field_weights(D, w, y_pos.shape[-2], tau, mask_self, iters, floor)
        return W @ y  # W_pos @ y_pos - W_neg @ y_neg


# Algorithm 1: the loss, with the normalisations of appendix A.6


def mean_over_ranks(t):
    """The mean of t over the processes of a job, which have equal shares of the groups."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(t)
        t = t / dist.get_world_size()
    return t


def mean_distances(targets, w, n_gen):
    """Step 1 of normalised_drift(): the targets centred, their distances and weights, for each
    shape; and [features + 1], the weighted mean distance of every feature and the mean weight."""
    centred, distances, weights, means = [], [], [], []
    for y in targets:
        centre = y[:, :, :n_gen].mean(2, keepdim=True, dtype=w.dtype)
        centred.append(y - centre)  # in float32, though y may be bf16
        distances.append(distance(centred[-1][:, :, :n_gen], centred[-1]))
        weights.append(w.repeat_interleave(y.shape[1] // len(w), 0))
        means.append((distances[-1].mean(2) * weights[-1]).mean((1, 2)))
    return centred, distances, weights, torch.cat([*means, w.mean().unsqueeze(0)])


@torch.no_grad()
def normalised_drift(
    targets, w, n_gen, n_pos, taus, iters, floor, whole_means=None, whole_drift=None
):
    """V of Algorithm 1, for features of several shapes at once.

    targets: an iterator, for each shape over a tensor y [F, G, T, C] of F features in G groups: the
    n_gen samples themselves, then unconditional images, then the n_pos positives. w [L, T]: their
    weights, for L labels of G / L groups each. If these labels are a part of the step only,
    whole_means [features + 1] and whole_drift [features, taus] are sums_of_parts() of all.

    -> V [F, G, n_gen, C] for each shape, to be added to the samples; and, all features in one row,
    scale [features], their weighted mean distance (of a sample to itself, too); s [features], which
    a feature is divided by to have mean distance sqrt(C); and drift [features, taus], the mean
    square of the field of each tau in features so divided.
    """
    with exact_float32(w.device.type):
        # 1. The mean distance of a feature, over groups, samples and targets, is its unit.
        centred, distances, weights, means = mean_distances(targets, w, n_gen)
        means = mean_over_ranks(means) if whole_means is None else whole_means
        scale = means[:-1] / means[-1]
        counts = [len(y) for y in centred]
        # tau * sqrt(C) in x / s is tau * scale in x: [F, 1, taus, 1, 1] for each shape
        widths = torch.stack([tau * scale.clamp(min=1e-3) for tau in taus], dim=1)
        widths = widths[:, None, :, None, None].split(counts)

        # 2. Algorithm 2 for every tau, and the mean square of its field; for as many groups at a
        # time as a cache, or a small part of a GPU, holds of [taus, N, T].
        most = 2**21 if w.device.type == "cpu" else 2**28
        fields, squares, s = [], [], []
        for i, mean in enumerate(scale.split(counts)):
            y, D, w_i = centred[i], distances[i].unsqueeze(2), weights[i].unsqueeze(1)
            n = max(1, most // (len(y) * len(taus) * D[0, 0].numel()))
            V = []
            for y_n, D_n, w_n in zip(y.split(n, 1), D.split(n, 1), w_i.split(n), strict=True):
                W = field_weights(D_n, w_n, n_pos, widths[i], True, iters, floor)
                V.append((W.flatten(2, 3) @ y_n).unflatten(2, W.shape[2:4]))
            V = V[0] if len(V) == 1 else torch.cat(V, dim=1)  # [F, G, taus, N, C]
            fields.append(V)
            squares.append(V.square().mean((1, 3, 4)))
            s.append((mean / y.shape[-1] ** 0.5).clamp(min=1e-3))  # x / s: mean distance sqrt(C)
        s = torch.cat(s)
        drift = torch.cat(squares) / s.square().unsqueeze(1)
        if whole_means is None:
            drift = mean_over_ranks(drift)
        elif whole_drift is not None:
            drift = whole_drift

        # 3. Every field is divided by its own root mean square (of V / s), and they are added.
        r = drift.clamp(min=1e-8).rsqrt()[:, None, :, None, None].split(counts)
        V = [field.mul_(r[i]).sum(2) for i, field in enumerate(fields)]
    return V, s, scale, drift


def drift_loss(
    x, y_pos, y_unc=None, w_unc=None, w_pos=None, w_gen=None, taus=TAUS, iters=1, floor=0.0
):
    """The loss of Algorithm 1 for one feature; its gradient reaches x only.

    x      [G, N, C]  generated; G groups (classes x locations), N samples, negatives of one another
    y_pos  [G, P, C]  real, of the group's class
    y_unc  [G, U, C]  real, of any class: further negatives, weighted by w_unc for guidance
    w_unc  [G, U], w_pos [G, P], w_gen [G, N]: weights of the targets, 1 if absent
    taus              kernel widths, in units of the mean distance between samples and targets
    iters, floor      see affinity()

    With another axis F in front of x and every y, these are F features of one shape, whose losses
    are added. -> loss, and stats: `scale`, the mean distance, and `drift` [len(taus)], the mean
    square of each raw field in features of mean distance sqrt(C); [F] and [F, len(taus)] with F.

    In a job of torch.distributed all ranks call it together, each with its share of the groups.

    **Watch stats["drift"], not the loss**: every field is divided by its own root mean square, so
    that the loss is about the same number from the first step to the last.
    """
    parts = [(x.detach(), w_gen), (y_unc, w_unc), (y_pos, w_pos)]
    parts = [(y, w) for y, w in parts if y is not None]
    w = torch.cat([y.new_ones(y.shape[-3:-1]) if w is None else w for y, w in parts], dim=-1)
    y = torch.cat([y for y, _ in parts], dim=-2)
    y = y if y.ndim == 4 else y[None]
    n_gen, n_pos = x.shape[-2], y_pos.shape[-2]
    [V], s, scale, drift = normalised_drift([y], as_float(w), n_gen, n_pos, taus, iters, floor)
    if x.ndim == 3:
        V, s, scale, drift = V[0], s[0], scale[0], drift[0]
    x = as_float(x)
    error = (x - (x + V).detach()).square().mean((-3, -2, -1))  # as in regress()
    return (error / s**2).sum(), {"scale": scale, "drift": drift}


# The loss of a step: many features, labels and locations


def by_shape(fx):
    """Names of features {name: [B, l, C]} as a list of lists, each of one shape and type."""
    names = {}
    for name, f in fx.items():
        names.setdefault((f.shape[1:], f.dtype), []).append(name)
    return list(names.values())


def join_targets(names, L, *sets):
    """Features [L * n, l, C] of some names, of samples and of real images, as [F, L * l, T, C]."""
    y = []
    for f in sets:
        if len(f[names[0]]):  # there may be no unconditional ones
            f = torch.stack([f[name].detach() for name in names])
            y.append(f.unflatten(1, (L, -1)).transpose(2, 3))  # [F, L, l, n, C]
    return torch.cat(y, dim=3).flatten(1, 2)  # a group is a label and a location


def step_targets(fx, fp, fu, alpha):
    """Arguments of features_drift() as the first four of normalised_drift()."""
    L = len(alpha)
    n_gen, n_unc, n_pos = (len(next(iter(f.values()))) // L for f in (fx, fu, fp))
    # Guidance: the unconditional images together weigh (alpha - 1) times the other N - 1 samples.
    w_unc = (alpha - 1) * (n_gen - 1) / max(1, n_unc)
    w = alpha.new_ones(L, n_gen + n_unc + n_pos)  # [L, T]
    w[:, n_gen : n_gen + n_unc] = w_unc[:, None]
    targets = (join_targets(names, L, fx, fu, fp) for names in by_shape(fx))
    return targets, w, n_gen, n_pos


def features_drift(fx, fp, fu, alpha, taus=TAUS, iters=1, floor=0.0, whole=(None, None)):
    """The drift of all features of a step, for regress().

    fx {name: [L * N, l, C]} generated, fp {name: [L * P, l, C]} positives, fu {name: [L * U, l, C]}
    unconditional, for L labels and the feature's l locations; alpha [L], their guidance strengths.
    whole: sums_of_parts(), if these labels are a part of the step.

    -> V [L * N, K], all K numbers of a sample's features in one row; weight [K], what the square of
    each counts in the loss; stats {name: [len(taus) + 1]}: drift and scale of drift_loss().
    """
    targets = step_targets(fx, fp, fu, alpha)
    fields, s, scale, drift = normalised_drift(*targets, taus, iters, floor, *whole)

    names = [name for same in by_shape(fx) for name in same]
    stats = torch.cat([drift, scale.unsqueeze(1)], dim=1)
    stats = dict(zip(names, stats, strict=True))
    L, rows, weights = len(alpha), [], []
    for V, inverse in zip(fields, s.pow(-2).split([len(V) for V in fields]), strict=True):
        row = V.unflatten(1, (L, -1)).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
        rows.append(row)  # [L * N, F * l * C]
        weights.append((inverse / V[0].numel()).repeat_interleave(row.shape[1] // len(V)))
    return torch.cat(rows, dim=1), torch.cat(weights), stats


@torch.no_grad()
def sums_of_parts(parts, taus=TAUS, iters=1, floor=0.0):
    """What the labels of a step share: the mean distance of every feature, and its mean drift.

    For a step whose features do not fit the memory. Labels couple by these alone, so that a part of
    them can be worked through at a time. parts(): an iterator over the arguments (fx, fp, fu,
    alpha) of features_drift() for parts of equally many labels; it is called twice, as the second
    sum needs the first. -> means and drift of normalised_drift(), over all parts and ranks.
    """
    means, drifts = [], []
    for part in parts():
        targets, w, n_gen, _ = step_targets(*part)
        with exact_float32(w.device.type):
            means.append(mean_distances(targets, w, n_gen)[-1])
    means = mean_over_ranks(torch.stack(means).mean(0))
    for part in parts():
        drifts.append(normalised_drift(*step_targets(*part), taus, iters, floor, means)[-1])
    return means, mean_over_ranks(torch.stack(drifts).mean(0))


def regress(fx, V, weight):
    """The loss of a step: that of Algorithm 1 for every feature, added (A.6).

    fx {name: [B, l, C]} and V [B, K] of any B of the samples of features_drift(): the losses of
    parts add up to that of the whole.
    """
    names = [name for same in by_shape(fx) for name in same]
    x = torch.cat([as_float(fx[name]).flatten(1) for name in names], dim=1)
    return ((x - (x + V).detach()).square() @ weight).sum()


def features_loss(fx, fp, fu, alpha, taus=TAUS, iters=1, floor=0.0):
    """Both at once: the loss of a step, and stats; arguments of features_drift()."""
    V, weight, stats = features_drift(fx, fp, fu, alpha, taus, iters, floor)
    return regress(fx, V, weight), stats


# The 2-D demo


def swiss_roll(n):
    t = 1.5 * torch.pi * (1 + 2 * torch.rand(n))
    return torch.stack([t * t.cos(), t * t.sin()], dim=1) / 15 + 0.02 * torch.randn(n, 2)


def checkerboard(n):
    """8 of the 16 squares of [-1, 1]^2."""
    column = torch.randint(4, (n,))
    row = 2 * torch.randint(2, (n,)) + column % 2
    return (torch.stack([column, row], dim=1) + torch.rand(n, 2)) / 2 - 1


def sliced_wasserstein(a, b, directions=200):
    """Mean Wasserstein-1 distance of the projections of a [N, 2] and b [N, 2] on random lines."""
    line = F.normalize(torch.randn(2, directions), dim=0)
    gap = (a @ line).sort(dim=0).values - (b @ line).sort(dim=0).values
    return gap.abs().mean().item()


def train_demo(data, args):
    """Trains an MLP from noise to a 2-D set; returns it and a film of (samples, data, drift)."""
    layers = [torch.nn.Linear(8, 128)]
    for width in (128, 128, 2):
        layers += [torch.nn.SiLU(), torch.nn.Linear(128, width)]
    net = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(net.parameters(), 2e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, args.steps)
    noise, film = torch.randn(400, 8), []
    shown = {round((args.steps - 1) * (i / 39) ** 2) for i in range(40)}  # most motion is early
    for step in range(args.steps):
        if step in shown:
            x, y = net(noise).detach(), data(400)
            tau = 0.05 * distance(x, y).mean()
            V = drift_field(x, y, x, tau, mask_self=True, iters=args.iters, floor=args.floor)
            film.append((x, y, V))
        x, y = net(torch.randn(256, 8)), data(256)
        loss, _ = drift_loss(x[None], y[None], iters=args.iters, floor=args.floor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net, film


def save_films(films, path, size=300):
    """One GIF of the films side by side: real points grey, samples orange, their drift blue."""
    from PIL import Image, ImageDraw

    frames = []
    for moment in zip(*films, strict=True):
        frame = Image.new("RGB", (size * len(films), size), "white")
        pen = ImageDraw.Draw(frame)
        for panel, (x, y, V) in enumerate(moment):
            V = V / V.norm(dim=1).mean().clamp(min=1e-6) * 0.1  # its mean length is for the eye
            x, y, tip = ((p.clamp(-1.2, 1.2) + 1.2) / 2.4 * size for p in (x, y, x + V))
            x, y, tip = ((p + torch.tensor([panel * size, 0])).tolist() for p in (x, y, tip))
            for a, b in y:
                pen.rectangle((a - 1, b - 1, a, b), fill="#c8c8c8")
            for start, end in zip(x[::4], tip[::4], strict=True):
                pen.line((*start, *end), fill="#3060c0")
            for a, b in x:
                pen.rectangle((a - 1, b - 1, a + 1, b + 1), fill="#e07020")
        frames.append(frame.quantize(8))
    times = [80] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)


def main():
    import argparse
    import time

    p = argparse.ArgumentParser(description="Trains an MLP by drifting on two 2-D data sets.")
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--iters", type=int, default=1, help="Sinkhorn steps; 1 is Algorithm 2")
    p.add_argument("--floor", type=float, default=0.0, help="1e-6: the official code's floor")
    p.add_argument("--out", default="drift.gif")
    args = p.parse_args()
    if args.steps < 1 or args.iters < 1 or not 0 <= args.floor <= 1:
        p.error("--steps and --iters must be at least 1, and --floor from 0 to 1")
    torch.set_flush_denormal(True)  # as exp() of far pairs gives, slow on some CPUs
    torch.manual_seed(0)
    films = []
    for data in (swiss_roll, checkerboard):
        began = time.time()
        net, film = train_demo(data, args)
        films.append(film)
        seconds = time.time() - began
        with torch.no_grad():
            pairs = [(net(torch.randn(2000, 8)), data(2000), data(2000)) for _ in range(10)]
        generated = sum(sliced_wasserstein(x, y) for x, y, _ in pairs) / len(pairs)
        real = sum(sliced_wasserstein(z, y) for _, y, z in pairs) / len(pairs)
        distances = f"generated {generated:.4f}, real {real:.4f}, ratio {generated / real:.2f}"
        print(f"{data.__name__:12s} sliced Wasserstein: {distances}, {seconds:.1f} s", flush=True)
    save_films(films, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
