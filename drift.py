"""
The drift field and the loss of "Generative Modeling via Drifting" (arXiv 2602.04770).

    x is a batch of generated samples, y_pos are real ones, y_neg are generated ones (often x itself).
    V(x) = attraction of x to y_pos  -  attraction of x to y_neg
    loss = | x - stopgrad(x + V(x)) |^2

If the generated and the real distribution are the same, the two pulls cancel and V = 0. Training follows V until then.

Run by itself, this file trains a small MLP on two 2-D data sets in seconds and draws drift.gif:
$ python drift.py
$ python drift.py --iters 3 --floor 1e-6      # see what the Sinkhorn steps and the official floor change
"""
import math
import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange

torch.set_flush_denormal(True)  # exp() of far pairs gives denormal floats, on which some CPUs are several times slower


@contextmanager
def exact_float32(device_type):
    """Neither autocast nor TF32: a distance is a difference of large numbers, and tau divides what is left of it."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _float(x):
    return x if x.dtype == torch.float64 else x.float()


def squared_distance(x, y):
    """|x - y|^2 between the rows of x [..., N, C] and y [..., M, C]: [..., N, M], up to rounding, even below zero."""
    xy = x @ y.transpose(-1, -2)                                                 # far faster than to take differences
    return xy.mul_(-2).add_(x.square().sum(-1).unsqueeze(-1)).add_(y.square().sum(-1).unsqueeze(-2))


def distance(x, y):
    """Euclidean distances [..., N, M] between the rows of x [..., N, C] and of y [..., M, C], at least 1e-4."""
    return squared_distance(x, y).clamp_(min=1e-8).sqrt_()


def affinity(dist, tau, mask_self=False, iters=1, floor=0.0):
    """Algorithm 2's A: geometric mean of the softmax over y and the softmax over x, [..., N, M] from distances.

    The mean is taken of logarithms. The official code takes sqrt(max(softmax * softmax, 1e-6)) instead, so that no
    pair, however far apart, has an affinity below 1e-3: x is then pulled to the mean of all y, and the samples of a
    class become one. floor=1e-6 reproduces that. iters > 1 goes on towards the Sinkhorn coupling of x and y.
    """
    logit = dist / -tau                                                           # Laplace kernel, k = exp(-dist/tau)
    if mask_self:
        logit.diagonal(dim1=-2, dim2=-1).sub_(1e6)      # finite: with N = 1 the softmax over x of -inf would be NaN
    for _ in range(iters):
        logit = logit.log_softmax(-1).add_(logit.log_softmax(-2)).div_(2)                        # over y, over x
    if floor:
        logit.clamp_(min=math.log(floor) / 2)
    return logit.exp_()


def _weights(dist, w, M, tau, mask_self, iters, floor):
    """W [..., N, M + P] with V = W @ y: dist [..., N, M + P] to targets of weights w, the first M of them negatives."""
    A = affinity(dist, tau, mask_self, iters, floor)                                               # [..., N, M + P]
    A = A.mul_(w.unsqueeze(-2))   # after the softmaxes: a weight scales a force, not the mass that others compete for
    A_neg, A_pos = A.split([M, A.shape[-1] - M], dim=-1)
    sum_neg, sum_pos = A_neg.sum(-1, keepdim=True), A_pos.sum(-1, keepdim=True)                         # [..., N, 1]
    A_pos.mul_(sum_neg)
    A_neg.mul_(-sum_pos)                                     # the same memory: A is now W, and its rows sum to zero
    return A


@torch.no_grad()
def drift_field(x, y_pos, y_neg, tau, w_neg=None, mask_self=False, iters=1, floor=0.0):
    """The drift V(x) of Algorithm 2, with the Laplace kernel exp(-|x - y| / tau), without any normalisation.

    x [..., N, C], y_pos [..., P, C], y_neg [..., M, C], w_neg [..., M] or None -> V [..., N, C], in units of x.
    tau is a distance. mask_self: the first N rows of y_neg are x itself, and no sample repels itself. w_neg multiplies
    the affinities after the softmaxes. iters and floor: see affinity(). float32 (float64 if x is), whatever autocast
    says; no gradient flows into it.
    """
    with exact_float32(x.device.type):
        x, y, w = _float(x), _float(torch.cat([y_neg, y_pos], dim=-2)), y_neg.new_ones(y_neg.shape[:-1])
        w = torch.cat([w if w_neg is None else w_neg, y_pos.new_ones(y_pos.shape[:-1])], dim=-1)          # [..., M + P]
        centre = x.mean(-2, keepdim=True)          # V does not see a shift; distances of far-off points lose digits
        x, y = x - centre, y - centre
        return _weights(distance(x, y), w, y_neg.shape[-2], tau, mask_self, iters, floor) @ y


@torch.no_grad()
def drift_target(x, y_pos, y_unc=None, w_unc=None, w_pos=None, w_gen=None, taus=(0.02, 0.05, 0.2), iters=1, floor=0.0,
                 chunk=None, reduce=lambda t: t):
    """What a feature is to regress on (Algorithm 1, A.6): features normalised, drifts normalised and summed over taus.

    x      [G, N, C]  generated; G groups (classes x locations of the feature), N samples, negatives of one another
    y_pos  [G, P, C]  real, of the group's class
    y_unc  [G, U, C]  real, of any class: further negatives, weighted by w_unc for guidance
    w_unc  [G, U], w_pos [G, P], w_gen [G, N]: weights of the targets, 1 if absent
    taus              kernel widths, in units of the mean distance between samples and targets
    chunk             groups whose N x (N + U + P) matrices are held at a time; None: what fits a cache, on a GPU memory
    reduce            sums a tensor over the ranks of a job, each of which has groups of its own

    -> target [G, N, C], x plus the drift, in units of x; the scalar s that normalises x; and stats: `scale`, the mean
    distance, and `drift` [len(taus)], the mean square of each raw field in normalised features. The loss of Algorithm 1
    is the mean square of (x - target) / s.
    """
    G, N, C = x.shape
    with exact_float32(x.device.type):
        parts = [(y, y.new_ones(y.shape[:2]) if w is None else w)
                 for y, w in ((x, w_gen), (y_unc, w_unc), (y_pos, w_pos)) if y is not None]
        T, w = sum(y.shape[1] for y, _ in parts), torch.cat([_float(w) for _, w in parts], dim=1)         # N + U + P
        M = T - y_pos.shape[1]                                                                  # negatives: x and y_unc

        cells = 2**18 if x.device.type == "cpu" else 2**24                     # numbers that are worked on at a time
        chunk = chunk or max(1, cells // (N * T))
        chunks = [slice(i, i + chunk) for i in range(0, G, chunk)]
        some = max(768, 2 * cells // (chunk * T))
        channels = [slice(i, i + some) for i in range(0, C, some)]

        def centred(g, c):  # V does not see a shift; the distance of two x loses digits if they are far from the origin
            y = torch.cat([_float(y[g, :, c]) for y, _ in parts], dim=1)                                 # [g, T, c]
            return y.sub_(y[:, :N].mean(1, keepdim=True))

        def dist(g):                                                                                     # [g, N, T]
            square = 0
            for y in (centred(g, c) for c in channels):
                square = squared_distance(y[:, :N], y).add_(square)
            return square.clamp_(min=1e-8).sqrt_()

        # To keep all distances saves time if they are few, and costs more memory than it is worth if they are many.
        kept = [dist(g) for g in chunks] if G * N * T <= 32 * cells else None
        dists = lambda: zip(chunks, kept or map(dist, chunks))
        total = sum((d.sum(1) * w[g]).sum() for g, d in dists())
        total, weight = reduce(torch.stack([total, N * w.sum()]))
        scale = total / weight                                          # weighted mean distance, one number per feature
        s = (scale / C**0.5).clamp(min=1e-3)               # divides coordinates: distances are then about sqrt(C) (A.6)

        target, drift = _float(x).clone(), []
        for tau in taus:
            V, square = [], 0
            for g, d in dists():
                W = _weights(d, w[g], M, tau * scale.clamp(min=1e-3), True, iters, floor)
                for c in channels:
                    V.append((g, c, W @ centred(g, c)))
                    square = square + V[-1][2].square().sum()
            square, count = reduce(torch.stack([square, torch.full_like(square, target.numel())]))
            drift.append(square / count / s**2)
            for g, c, v in V:
                target[g, :, c].addcmul_(v, drift[-1].clamp(min=1e-8).rsqrt())
            del V, v, W                                                              # before the next ones are made
        return target, s, {"scale": scale, "drift": torch.stack(drift)}


def drift_loss(x, *args, **kwargs):
    """The loss of one feature, whose gradient reaches x only, and stats; arguments and stats of drift_target().

    **Watch stats["drift"], not the loss**: every field is divided by its own root mean square, so that the loss is
    about the same number from the first step to the last.
    """
    target, s, stats = drift_target(x, *args, **kwargs)
    return F.mse_loss(_float(x), target) / s**2, stats


def features_target(fx, fp, fu, alpha, **kwargs):
    """The targets of a step, for all features: {name: (target [L * N, l, C], s)}, to be used by regress().

    fx {name: [L * N, l, C]} generated, fp {name: [L * P, l, C]} positives, fu {name: [L * U, l, C]} unconditional, for
    L labels and the feature's l locations; alpha [L], their guidance strengths; kwargs: of drift_target. Every feature
    that is done is taken out of the dictionaries, to free its memory.
    -> targets, and the mean over names of [drift of each tau, scale], [len(taus) + 1].
    """
    L, targets, stats = len(alpha), {}, []
    for name in list(fx):
        x, y_pos, y_unc = (rearrange(f.pop(name), "(L n) l c -> (L l) n c", L=L) for f in (fx, fp, fu))
        w_unc = (alpha - 1) * (x.shape[1] - 1) / max(1, y_unc.shape[1])                                            # [L]
        w_unc = w_unc.repeat_interleave(len(x) // L)[:, None].expand(y_unc.shape[:2])                       # [L * l, U]
        target, s, stat = drift_target(x, y_pos, y_unc, w_unc, **kwargs)
        targets[name] = rearrange(target, "(L l) n c -> (L n) l c", L=L), s
        stats.append(torch.cat([stat["drift"], stat["scale"][None]]))
    return targets, torch.stack(stats).mean(0)


def regress(fx, targets, rows=slice(None)):
    """The loss of a step: those of all features, added (A.6). fx, of the samples that rows names, or of all."""
    return sum(F.mse_loss(_float(fx[name]), target[rows]) / s**2 for name, (target, s) in targets.items())


def features_loss(fx, fp, fu, alpha, **kwargs):
    """Both at once: the loss of a step, and stats; arguments of features_target(). Nothing weighs the features."""
    targets, stats = features_target(dict(fx), dict(fp), dict(fu), alpha, **kwargs)
    return regress(fx, targets), stats


def swiss_roll(n, generator):
    t = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
    points = torch.stack([t * t.cos(), t * t.sin()], dim=1) / 15
    return points + 0.02 * torch.randn(n, 2, generator=generator)


def checkerboard(n, generator):
    """8 of the 16 squares of [-1, 1]^2."""
    column = torch.randint(4, (n,), generator=generator)
    row = 2 * torch.randint(2, (n,), generator=generator) + column % 2
    return (torch.stack([column, row], dim=1) + torch.rand(n, 2, generator=generator)) / 2 - 1


def sliced_wasserstein(a, b, generator, directions=200):
    """Mean Wasserstein-1 distance of the projections of a [N, 2] and b [N, 2] on random lines."""
    line = F.normalize(torch.randn(2, directions, generator=generator), dim=0)
    return ((a @ line).sort(dim=0).values - (b @ line).sort(dim=0).values).abs().mean().item()


def demo(data, steps, n, iters, floor, generator, frames):
    """Trains an MLP from noise to a 2-D set; returns sliced Wasserstein distances, generated and real, to real."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 128), torch.nn.SiLU(), torch.nn.Linear(128, 128), torch.nn.SiLU(),
                              torch.nn.Linear(128, 128), torch.nn.SiLU(), torch.nn.Linear(128, 2))
    optimizer = torch.optim.Adam(net.parameters(), 2e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    fixed, film = torch.randn(400, 8, generator=generator), []
    shown = {round((steps - 1) * (i / (frames - 1)) ** 2) for i in range(frames)}          # most of the motion is early
    for step in range(steps):
        if step in shown:
            with torch.no_grad():
                x, y = net(fixed), data(400, generator)
            tau = 0.05 * distance(x, y).mean()
            film.append((x, y, drift_field(x, y, x, tau, mask_self=True, iters=iters, floor=floor)))
        x, y = net(torch.randn(n, 8, generator=generator)), data(n, generator)
        loss, _ = drift_loss(x[None], y[None], iters=iters, floor=floor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        pairs = [(net(torch.randn(2000, 8, generator=generator)), data(2000, generator), data(2000, generator))
                 for _ in range(10)]
    generated = sum(sliced_wasserstein(x, y, generator) for x, y, _ in pairs) / len(pairs)
    real = sum(sliced_wasserstein(z, y, generator) for _, y, z in pairs) / len(pairs)
    return generated, real, film


def draw(films, path, size=300):
    """One GIF of the films side by side: real points grey, samples orange, the drift of every fourth as a line."""
    from PIL import Image, ImageDraw
    frames = []
    for panels in zip(*films):
        frame = Image.new("RGB", (size * len(panels), size), "white")
        pen = ImageDraw.Draw(frame)
        for i, (x, y, V) in enumerate(panels):
            pixel = lambda p: ((p.clamp(-1.2, 1.2) + 1.2) / 2.4 * size + torch.tensor([i * size, 0])).tolist()
            V = V / V.norm(dim=1).mean().clamp(min=1e-6) * 0.1                       # its mean length is for the eye
            for a, b in pixel(y):
                pen.rectangle((a - 1, b - 1, a, b), fill="#c8c8c8")
            for (a, b), (c, d) in zip(pixel(x[::4]), pixel((x + V)[::4])):
                pen.line((a, b, c, d), fill="#3060c0")
            for a, b in pixel(x):
                pen.rectangle((a - 1, b - 1, a + 1, b + 1), fill="#e07020")
        frames.append(frame.quantize(8))
    timing = dict(duration=[80] * (len(frames) - 1) + [2000], loop=0)
    frames[0].save(f"{path}.tmp", format="gif", save_all=True, append_images=frames[1:], **timing)
    os.replace(f"{path}.tmp", path)


def main():
    import argparse
    import time
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Trains an MLP by drifting on a swiss roll and on "
                                "a checkerboard. Prints the sliced Wasserstein distance to real points, beside that of "
                                "two real sets, and writes an animation: real points grey, samples orange, their drift "
                                "blue.")
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--n", type=int, default=256, help="samples, and real points, of a step")
    p.add_argument("--iters", type=int, default=1, help="Sinkhorn steps of the affinity; 1 is Algorithm 2")
    p.add_argument("--floor", type=float, default=0.0, help="1e-6: the official code's floor of the affinity")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="drift.gif")
    args = p.parse_args()
    if not (1 <= args.steps <= 10**9 and 2 <= args.n <= 10**6 and 1 <= args.iters <= 1000 and 0 <= args.floor <= 1 and
            0 <= args.seed < 2**63):
        p.error("--steps and --iters must be at least 1, --n 2, --floor from 0 to 1, --seed not negative")
    torch.manual_seed(args.seed)
    generator, films = torch.Generator().manual_seed(args.seed), []
    for data in (swiss_roll, checkerboard):
        began = time.time()
        generated, real, film = demo(data, args.steps, args.n, args.iters, args.floor, generator, frames=40)
        films.append(film)
        print(f"{data.__name__:12s} sliced Wasserstein: generated {generated:.4f}, real {real:.4f}, "
              f"ratio {generated / real:.2f}, {time.time() - began:.1f} s", flush=True)
    draw(films, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
