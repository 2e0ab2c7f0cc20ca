"""The drift field and the loss of "Generative Modeling via Drifting" (arXiv 2602.04770).

    V(x) = attraction of x to real samples  -  attraction of x to generated ones
    loss = | x - stopgrad(x + V(x)) |^2

If the generated and the real distribution are the same, the two forces cancel and V = 0.
drift_field() is the plain field of Algorithm 2; drift_loss() is Algorithm 1 in the units of the
paper's appendix A.6. This file needs only torch, 2.9 or later: copy it into your own project.
Shapes: F features of a shape, G groups (labels x locations), N samples, T targets, C channels."""

import torch
import torch.distributed as dist

TAUS = (0.02, 0.05, 0.2)  # kernel widths, in units of the mean distance


def as_float(x):
    return x if x.dtype == torch.float64 else x.float()


def distance(x, y):
    """Euclidean distances [..., N, T] of x [..., N, C] and y [..., T, C], not below 1e-4."""
    square = matmul(x, y.mT).mul_(-2)
    square.add_(x.square().sum(-1).unsqueeze(-1)).add_(y.square().sum(-1).unsqueeze(-2))
    return square.clamp_(min=1e-8).sqrt_()


def affinity(D, tau, mask_self=False, iters=1, floor=0.0):
    """A of Algorithm 2 [..., N, T]: geometric mean of the softmax over y and the softmax over x.

    D [..., N, T]: distances; tau: width of the kernel exp(-D / tau). mask_self: the first N columns
    are the rows themselves, and no sample sees itself. iters > 1 averages again, so that the sums
    of rows and columns get closer. floor: least product of the softmaxes, officially 1e-6."""
    logit = D / -tau
    if mask_self:
        logit.diagonal(dim1=-2, dim2=-1).sub_(1e6)  # with a single sample, -inf would give NaN
    for _ in range(iters):
        over_y, over_x = logit.log_softmax(-1), logit.log_softmax(-2)
        logit = over_y.lerp_(over_x, 0.5)  # log sqrt(softmax over y * softmax over x)
    A = logit.exp_()
    return A.clamp_(min=floor**0.5) if floor else A


def field(D, w, y, n_pos, tau, mask_self, iters, floor):
    """V [..., N, C] from distances D [..., N, T] to targets y [..., T, C], the last n_pos real.
    w [..., T] scales the forces of the targets and leaves the softmaxes alone."""
    A = affinity(D, tau, mask_self, iters, floor).mul_(w.unsqueeze(-2))  # in place, as it is large
    A_neg, A_pos = A.split([A.shape[-1] - n_pos, n_pos], dim=-1)
    sum_neg, sum_pos = A_neg.sum(-1, keepdim=True), A_pos.sum(-1, keepdim=True)
    A_pos.mul_(sum_neg)  # W_pos = A_pos * sum(A_neg)
    A_neg.mul_(-sum_pos)  # -W_neg = -A_neg * sum(A_pos)
    return matmul(A, y)  # W_pos @ y_pos - W_neg @ y_neg


@torch.no_grad()
def drift_field(x, y_pos, y_neg, tau, mask_self=False, iters=1, floor=0.0):
    """The drift V(x) of Algorithm 2, without any normalisation, [..., N, C] in units of x.
    x [..., N, C], y_pos [..., P, C], y_neg [..., M, C]; tau is a distance. mask_self: the first N
    rows of y_neg are x itself. float32 or float64; no gradient."""
    y = as_float(torch.cat([y_neg, y_pos], dim=-2))
    w = y.new_ones(y.shape[-2])
    centre = as_float(x).mean(-2, keepdim=True)  # V does not change, but is rounded less
    y = y - centre
    return field(distance(x - centre, y), w, y, y_pos.shape[-2], tau, mask_self, iters, floor)


def mean_over_ranks(t):
    """The mean of t over the ranks of a job, which all call it; t may be overwritten."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(t)
        t = t / dist.get_world_size()
    return t


def drift_loss(x, y_pos, y_unc=None, w_unc=None, taus=TAUS, iters=1, floor=0.0, field=field):
    """The loss of Algorithm 1 with its units (A.6) for one feature; its gradient reaches x only.

    x      [G, N, C]  generated samples, negatives of one another
    y_pos  [G, P, C]  real, of the group's label
    y_unc  [G, U, C]  real, of any label: further negatives, weighted by w_unc for guidance
    w_unc  [G, U]     weights of y_unc, 1 if absent
    field             field(), compiled or one of your own

    With another axis F in front of x and every y, these are F features, whose losses are added.
    -> loss, and stats: `scale` [F], the mean distance, and `drift` [F, len(taus)], the mean square
    of each raw field in features of mean distance sqrt(C): watch it, as the loss hardly moves."""
    x = as_float(x)
    n_gen, n_pos, C = x.shape[-2], y_pos.shape[-2], x.shape[-1]
    with torch.no_grad():
        targets = [as_float(t) for t in (x, y_unc, y_pos) if t is not None]
        y = torch.cat(targets, dim=-2)  # [F, G, T, C]
        w = y.new_ones(y.shape[-3:-1])  # [G, T]
        if w_unc is not None:
            w[:, n_gen:-n_pos] = w_unc
        y = y - x.mean(-2, keepdim=True)  # V does not change, but is rounded less
        D = distance(y[..., :n_gen, :], y)  # [F, G, N, T]

        # The unit of a feature is its weighted mean distance, over groups, samples and targets.
        total = (D.mean(-2) * w).mean((-2, -1))
        total, mass = mean_over_ranks(torch.stack([total, w.mean().expand_as(total)]))
        scale = total / mass
        unit = scale.clamp(min=1e-3)[..., None, None, None]  # 1e-3 as in the official code
        s = (scale / C**0.5).clamp(min=1e-3)[..., None, None, None]  # x / s: mean distance sqrt(C)

        # Algorithm 2 for every tau; some groups at a time, as their A stays in a CPU's cache.
        n = max(1, (2**28 if x.is_cuda else 2**20) // D.select(-3, 0).numel())
        parts = list(zip(D.split(n, -3), w.split(n, -2), y.split(n, -3), strict=True))
        fields = []
        for tau in taus:
            V = [field(*part, n_pos, tau * unit, True, iters, floor) for part in parts]
            fields.append(torch.cat(V, dim=-3) / s)

        # Every field is divided by its own root mean square, and they are added.
        drift = mean_over_ranks(torch.stack([V.square().mean((-3, -2, -1)) for V in fields]))
        rms = drift.clamp(min=1e-8).sqrt()[..., None, None, None]
        target = x / s + sum(V / r for V, r in zip(fields, rms, strict=True))
    loss = (x / s - target).square().mean((-3, -2, -1)).sum()
    return loss, {"scale": scale, "drift": drift.movedim(0, -1)}


def draw_alpha(n, most, k, share_one, g):
    """Guidance strengths [n]: 1 for a share of them, else on [1, most] with density alpha^-k."""
    u = torch.rand(2, n, generator=g, device=g.device)
    p = 1 - k
    alpha = (1 + u[0] * (most**p - 1)) ** (1 / p) if p else most ** u[0]  # inverse of the CDF
    return torch.where(u[1] < share_one, 1.0, alpha)


def features_loss(fx, fp, fu, alpha, taus=TAUS, iters=1, floor=0.0, field=field):
    """The loss of a step: drift_loss() of every feature, added (A.6).

    fx {name: [L * N, l, C]} generated, fp {name: [L * P, l, C]} positives, fu {name: [L * U, l, C]}
    unconditional (U may be 0), for L labels and the feature's l locations; alpha [L], guidance.
    -> loss, and stats {name: [len(taus) + 1]}: `drift` and `scale` of drift_loss()."""
    L, same_shape = len(alpha), {}
    for name, f in fx.items():
        same_shape.setdefault((f.shape, f.dtype), []).append(name)
    loss, stats = 0, {}
    for names in same_shape.values():
        # [F, L * n, l, C] -> [F, L * l, n, C], as a group is a label and a location
        stacks = [torch.stack([feats[name] for name in names]) for feats in (fx, fp, fu)]
        x, y_pos, y_unc = (f.unflatten(1, (L, -1)).transpose(2, 3).flatten(1, 2) for f in stacks)
        n_gen, n_unc = x.shape[-2], y_unc.shape[-2]
        # Guidance: the unconditional images together weigh alpha - 1 times the other N - 1 samples.
        w_unc = (alpha - 1) * (n_gen - 1) / max(1, n_unc)  # [L]
        w_unc = w_unc.repeat_interleave(x.shape[1] // L)[:, None].expand(-1, n_unc)
        part, found = drift_loss(x, y_pos, y_unc, w_unc, taus, iters, floor, field)
        loss = loss + part
        rows = torch.cat([found["drift"], found["scale"][:, None]], dim=1)
        stats |= dict(zip(names, rows, strict=True))
    return loss, stats


@torch.library.custom_op("drifting::matmul", mutates_args=())
def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in full precision, whatever autocast and TF32 are set to: small differences of large
    squares are divided by a small tau. An operator, as torch.compile cannot trace such switches."""
    switches = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    with torch.autocast(a.device.type, enabled=False):
        product = a @ b
    for switch, precision in zip(switches, before, strict=True):
        switch.fp32_precision = precision
    return product


@matmul.register_fake
def _(a, b):  # the shape of the product, for torch.compile
    return a.new_empty(*a.shape[:-1], b.shape[-1])
