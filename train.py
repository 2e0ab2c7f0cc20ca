"""
Trains a one-step generator by drifting.

Embedded digits, CPU or GPU, two minutes of two CPU cores: writes out.pt and samples.png
$ python train.py

CIFAR-10: at 16 x 16 in twenty minutes of a CPU; at 32 x 32 on one GPU, or eight
$ python train.py --dataset cifar10-16
$ torchrun --standalone --nproc_per_node=8 train.py --dataset cifar10

A folder of images with one sub-folder per class; every flag overrides the preset of the data set
$ python train.py --dataset folder:flowers --size 64 --model S --patch 4

The authors' ImageNet generator, fine-tuned on it, in the features of their encoder
$ python train.py --dataset folder:flowers --init hf://pixel_B_sota --encoder hf://mae_pixel_640

The drift measured in the features of an encoder trained on the data and of a foundation model
$ python train.py --dataset cifar10 --encoder mae,dinov2

More samples than fit the memory at once; the gradient is the same
$ python train.py --dataset cifar10 --n_gen 256 --n_pos 256 --micro_batch 128 --label_batch 1

The paper's ImageNet recipes, on what `python data.py encode` has written: see docs/imagenet.md
$ torchrun --standalone --nproc_per_node=8 train.py --dataset imagenet-latent-ablation:latents

Without labels, in one large group of samples
$ python train.py --dataset cifar10 --unconditional

On a machine that may be taken away: starts, or goes on from the newest whole checkpoint
$ python train.py --dataset cifar10 --resume auto
"""

import argparse
import hashlib
import math
import os
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

import data
import drift
import features
import fid
import latents
import mae
from log import Log, commit
from model import SIZES, DiT, DiTConfig, load_checkpoint
from muon import Muon

IMAGENET = dict(dataset="latents", size=None, n_gen=64, n_pos=64, n_unc=32, warmup=10000)
IMAGENET |= dict(decay=0.0, ema=0.999, iters=1, floor=1e-6, eval_every=5000)
LATENT = IMAGENET | dict(patch=2, labels=128, lr=4e-4, steps=200000, encoder="hf://mae_latent_640")
PIXEL = IMAGENET | dict(patch=16, labels=128, n_pos=128, steps=100000, alpha_k=5.0, alpha_one=0.0)
PIXEL |= dict(encoder="hf://mae_pixel_640,convnextv2")
SMALL = dict(pools=[2, 4], n_pos=128, muon=0.02)  # for two CPU cores
MNIST = SMALL | dict(size=28, patch=7, windows=[8], steps=1600, n_unc=32)
PRESETS = {  # what differs from the defaults of flags()
    "digits": dict(size=8, patch=4, steps=600, eval_every=300, log_every=50)
    | dict(muon=0.02, n_pos=128, alpha_one=0.85),
    "mnist": MNIST,
    "fashion": MNIST,
    "cifar10-16": SMALL
    | dict(dataset="cifar10", size=16, windows=[4, 8], edges=True, flip=True, steps=2000)
    | dict(n_unc=0, alpha_max=1),
    # one GPU, for hours; no GPU has seen it yet
    "cifar10": dict(size=32, model="S", patch=2, encoder="mae", pools=[2, 4], flip=True)
    | dict(steps=100000, lr=2e-4, warmup=3000, ema=0.999, eval_every=5000)
    | dict(labels=5, n_gen=128, n_pos=256, n_unc=0, alpha_max=1),
    "folder": dict(size=64, patch=8, encoder="mae", steps=5000, ema=0.999, flip=True),
    "npz": dict(size=None, encoder="mae", steps=5000, ema=0.999),
    "latents": dict(size=None, patch=2, encoder="mae", steps=5000, ema=0.999),
    # the authors' own numbers, for a cluster
    "imagenet-latent-ablation": LATENT
    | dict(model="B", labels=64, n_unc=16, lr=2e-4, warmup=5000, steps=30000, alpha_one=0.0)
    | dict(encoder="hf://mae_latent_256"),
    "imagenet-latent-B": LATENT | dict(model="B", alpha_k=5.0, alpha_one=0.0, wd=0.0),
    "imagenet-latent-L": LATENT | dict(model="L"),
    "imagenet-pixel-B": PIXEL | dict(model="B", lr=2e-4),
    "imagenet-pixel-L": PIXEL | dict(model="L", lr=4e-4),
}
# what a resumed run may not change
FIXED = ("dataset", "size", "encoder", "pools", "windows", "edges", "model", "patch")
N_EVAL = 1000  # images that are generated for the scores, and 10,000 for FID
N_FID = 10000


# Arguments


def flags():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    yes_no = argparse.BooleanOptionalAction
    positive_int, number, share = data.positive_int, data.number, data.share
    rate = number(float, 0, 1e6)
    p.add_argument(
        "--dataset",
        default="digits",
        help=f"{', '.join(PRESETS)}; all but the first five with :PATH",
    )
    p.add_argument("--unconditional", action=yes_no, default=False, help="one class, one group")
    p.add_argument("--data_dir", default="data", help="where data sets are, or are downloaded to")
    p.add_argument("--size", type=number(int, 2, 4096), default=8, help="image size in pixels")
    p.add_argument("--flip", action=yes_no, default=False, help="mirror half of the images")
    p.add_argument("--encoder", default="pixels", help="mae, or one or several of features.py")
    p.add_argument("--encoder_size", type=positive_int, help="input size of timm's encoders")
    p.add_argument(
        "--pools", type=positive_int, nargs="*", default=[], help="drift of k x k means, too"
    )
    p.add_argument(
        "--windows", type=positive_int, nargs="*", default=[], help="drift of windows of k x k, too"
    )
    p.add_argument("--edges", action=yes_no, default=False, help="drift of edges by direction, too")
    p.add_argument("--init", help="generator to start from, as of sample.py")
    p.add_argument("--model", default="tiny", help=", ".join(SIZES))
    p.add_argument("--patch", type=positive_int, default=4, help="of the generator, in pixels")
    p.add_argument("--steps", type=positive_int, default=600, help="in all, resumed ones included")
    p.add_argument("--lr", type=rate, default=3e-3, help="learning rate")
    p.add_argument("--muon", type=rate, default=0.0, help="rate of Muon; 0: AdamW alone")
    p.add_argument(
        "--warmup", type=number(int, 0, 10**9), default=50, help="steps to the full --lr"
    )
    p.add_argument(
        "--decay", type=share, default=0.4, help="last share of the steps, lr falls to 0"
    )
    p.add_argument("--wd", type=rate, default=0.01, help="weight decay, of all parameters")
    p.add_argument("--ema", type=share, default=0.99, help="decay of the average of the weights")
    p.add_argument(
        "--labels",
        type=number(int, 1, 10**5),
        default=10,
        help="in a step, a multiple of the ranks",
    )
    p.add_argument("--n_gen", type=number(int, 2, 10**6), default=32, help="samples per label")
    p.add_argument("--n_pos", type=number(int, 1, 10**6), default=32, help="real images per label")
    p.add_argument(
        "--n_unc",
        type=number(int, 0, 10**6),
        default=8,
        help="real images of any class, for guidance",
    )
    p.add_argument("--micro_batch", type=positive_int, help="samples at a time, to save memory")
    p.add_argument("--label_batch", type=positive_int, help="labels at a time, to save more")
    p.add_argument(
        "--taus",
        type=number(float, 1e-6, 1e6),
        nargs="+",
        default=list(drift.TAUS),
        help="kernel widths, in units of the mean distance",
    )
    p.add_argument(
        "--iters",
        type=number(int, 1, 1000),
        default=2,
        help="averages of the softmaxes; Algorithm 2: 1",
    )
    p.add_argument("--floor", type=share, default=0.0, help="least softmax product; official: 1e-6")
    p.add_argument(
        "--alpha_max",
        type=number(float, 1, 1000),
        default=4.0,
        help="guidance is drawn from 1 to this",
    )
    p.add_argument(
        "--alpha_k",
        type=number(float, -10, 10),
        default=3.0,
        help="whose density falls as alpha^-k",
    )
    p.add_argument("--alpha_one", type=share, default=0.5, help="share of labels without guidance")
    p.add_argument("--compile", action=yes_no, help="by torch.compile; if not given: on CUDA")
    p.add_argument("--log_every", type=positive_int, default=100, help="steps to a line of the log")
    p.add_argument(
        "--eval_every", type=positive_int, default=1000, help="steps to scores and files"
    )
    p.add_argument("--fid_every", type=positive_int, help="steps between FIDs")
    p.add_argument("--vae", help="autoencoder that decodes latents for pictures, as of sample.py")
    p.add_argument("--out", default="out.pt", help="checkpoint; beside it the log, out.jsonl")
    p.add_argument("--wandb", help="project of Weights & Biases that gets the log, too")
    p.add_argument("--resume", help="a checkpoint; auto: --out, if it is there")
    p.add_argument(
        "--stop_after", type=positive_int, help="end at this step; the plan stays of --steps"
    )
    p.add_argument("--seed", type=data.seed, default=0)
    p.add_argument("--deterministic", action=yes_no, default=False, help="slower on a GPU")
    p.add_argument("--device", type=data.device, default=data.default_device())
    return p


def parse(argv=None):
    """-> the arguments, and the checkpoint to go on from, or None. Raises ValueError.

    What is typed overrides the preset, or the arguments of the resumed checkpoint.
    """
    argv = sys.argv[1:] if argv is None else argv
    p = flags()
    first, _ = p.parse_known_args(argv)
    checkpoint = find_checkpoint(first) if first.resume else None
    if checkpoint:
        stored = checkpoint["args"]
        out = first.out if first.resume == "auto" else first.resume
        argv = [*as_flags(stored, known=vars(first)), "--out", out, *argv]
        first, _ = p.parse_known_args(argv)
    name, colon, path = first.dataset.partition(":")
    preset = PRESETS.get(name, {})
    if not checkpoint:
        p.set_defaults(**preset)
        if first.unconditional or data.unlabelled(first.dataset):
            together = {n: p.get_default(n) * p.get_default("labels") for n in ("n_gen", "n_pos")}
            p.set_defaults(unconditional=True, labels=1, n_unc=0, **together)
    args = p.parse_args(argv)
    args.command = stored.get("command") if checkpoint else shlex.join(["train.py", *argv])
    if "dataset" in preset:
        args.dataset = preset["dataset"] + colon + path
    if not args.n_unc:
        args.alpha_max = 1.0  # no unconditional images, no guidance
    if args.model not in SIZES and not checkpoint:
        raise ValueError(f"--model {args.model}: there are {', '.join(SIZES)}")
    for name in FIXED if checkpoint else ():
        if getattr(args, name) != stored[name]:
            differs = f"--{name} {getattr(args, name)} differs from {stored[name]}"
            raise ValueError(f"{differs} of the checkpoint of --resume {args.resume}")
    return args, checkpoint


def as_flags(args, known):
    """Arguments of a checkpoint as they were typed, so that they are checked like typed ones."""
    flags = []
    for name, value in args.items():
        if name not in known or value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")  # a number may begin with a minus
    return flags


def previous(out):
    """The name of the checkpoint before the last."""
    return out.with_name(f"{out.stem}.prev{out.suffix}")


def find_checkpoint(args):
    """The checkpoint that --resume means, with `net`, a generator of its weights.

    None: auto found no file. `damaged`: auto had to take the one before --out. ValueError if there
    is none that can be read.
    """
    auto, out = args.resume == "auto", Path(args.out)
    wrong = []
    for path in [out, previous(out)] if auto else [Path(args.resume)]:
        if auto and not path.exists():
            continue
        try:
            checkpoint = load_checkpoint(path)
            net = DiT(DiTConfig(**checkpoint["config"]))
            net.load_state_dict(checkpoint["model"])
            if not isinstance(checkpoint["step"], int) or not set(FIXED) <= set(checkpoint["args"]):
                raise ValueError("of another program")
        except Exception as error:  # what torch raises for a damaged file has no type in common
            wrong.append(f"{path} ({type(error).__name__})")
            continue
        if wrong:
            print(f"warning: cannot resume from {wrong[0]}, going on from {path}", file=sys.stderr)
        return checkpoint | {"net": net, "damaged": bool(wrong)}
    if wrong:
        raise ValueError(
            f"cannot resume from {' or '.join(wrong)}: missing, damaged or no checkpoint"
        )


# One step


def stream(device, *key):
    """A torch.Generator that depends on the key alone, such as (seed, step, purpose, place).

    So what a place in the list of labels gets does not depend on how many ranks there are, or on
    where a resumed run began; and changing what one purpose draws reshuffles no other.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "big"))


def draw_alpha(n, args, generator):
    """Guidance strengths [n]: 1 for a share of them, else on [1, alpha_max] as alpha^-k."""
    u = torch.rand(2, n, generator=generator, device=generator.device)
    alpha = args.alpha_max ** u[0]  # k = 1: uniform in its logarithm
    if args.alpha_k != 1:
        p = 1 - args.alpha_k
        alpha = (1 + u[0] * (args.alpha_max**p - 1)) ** (1 / p)  # inverse of the CDF
    return alpha.where(u[1] >= args.alpha_one, torch.ones_like(alpha))


def draw_batch(step, args, sampler, model, mine):
    """What a step is about, for the labels in the slice `mine` of it, l of them, N = n_gen.

    -> label [l], alpha [l], pos [l, P, C, H, W], unc [l, U, C, H, W], noise [l * N, C, H, W],
    style [l * N, 32].
    """
    home, key = sampler.home, (args.seed, step)
    classes = model.config.num_classes
    label = []
    for i in range(math.ceil(args.labels / classes)):  # no class twice before every class came once
        generator = stream(home, *key, "labels", i)
        label.append(torch.randperm(classes, generator=generator, device=home))
    label = torch.cat(label)[: args.labels]
    pos, unc = sampler.draw(label, args.n_pos, args.n_unc, stream(home, *key, "data"), mine)
    device = sampler.device
    label = label.to(device, non_blocking=True)
    alpha = draw_alpha(args.labels, args, stream(device, *key, "alpha"))
    places = range(args.labels)[mine]
    noise = [model.draw(args.n_gen, stream(device, *key, "noise", place)) for place in places]
    noise, style = (torch.cat(draws) for draws in zip(*noise, strict=True))
    return label[mine], alpha[mine], pos, unc, noise, style


def one_ahead(draw, start, end, ahead):
    """(step, draw(step)) of every step; if ahead, by a thread while the step before is computed, as
    images come from a disk or the host's memory."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(draw, start) if ahead and start < end else None
        for step in range(start, end):
            batch = coming.result() if ahead else draw(step)
            if ahead and step + 1 < end:
                coming = thread.submit(draw, step + 1)
            yield step, batch


def generate(forward, part):
    """Images of a part of the batch, (noise, style, label, alpha)."""
    device = part[0].device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return forward(*part).to(part[0].dtype)


@torch.no_grad()
def encode_all(encode, n_samples, *sets):
    """Features of several sets of images [l, n, C, H, W], a dictionary of each; of at most so many
    images at a time."""
    images = torch.cat([images.flatten(0, 1) for images in sets])
    n_samples = part_size(len(images), n_samples)
    missing = images.new_zeros(-len(images) % n_samples, *images.shape[1:])  # one shape to compile
    parts = [encode(part) for part in torch.cat([images, missing]).split(n_samples)]
    f = {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}
    counts = [images.shape[0] * images.shape[1] for images in sets]
    cut = {name: v[: sum(counts)].split(counts) for name, v in f.items()}
    return [{name: v[i] for name, v in cut.items()} for i in range(len(sets))]


def images_gradient(x, pos, unc, alpha, encode, args, n_samples, whole=(None, None)):
    """The gradient of the loss with respect to images x [l * N, C, H, W], and stats of the drift.

    The drift needs the features of all images, and is a constant then. So every part of x is
    encoded without gradient, for the drift, and again with it; of the last part, once is enough.
    """
    *parts, last = (part.requires_grad_() for part in x.split(n_samples))
    fp, fu = encode_all(encode, n_samples, pos, unc)
    with torch.no_grad():
        fx = [encode(part) for part in parts]
    f_last = encode(last)
    fx = {name: torch.cat([*(f.pop(name) for f in fx), f_last[name]]) for name in f_last}
    field = args.taus, args.iters, args.floor
    V, weight, stats = drift.features_drift(fx, fp, fu, alpha, *field, whole)
    del fx, fp, fu  # the largest tensors of a step
    *V, V_last = V.split(n_samples)
    dx_last = torch.autograd.grad(drift.regress(f_last, V_last, weight), last)
    del f_last
    dx = []
    for part, v in zip(parts, V, strict=True):
        dx += torch.autograd.grad(drift.regress(encode(part), v, weight), part)
    return torch.cat([*dx, *dx_last]), by_encoder(stats)


def encode_labels(parts, encode, n_samples):
    """Features of every part (x, pos, unc, alpha) of the labels, for drift.sums_of_parts()."""
    for *images, alpha in parts:
        yield *encode_all(encode, n_samples, *images), alpha


def images_gradient_by_labels(x, pos, unc, alpha, encode, args, n_samples, n_labels):
    """The same for so many labels at a time, exactly: the features of no more have to be held.

    They are computed for the mean distances, again for the mean drift, and again for the targets.
    """
    if n_labels == len(alpha):
        return images_gradient(x, pos, unc, alpha, encode, args, n_samples)
    sets = x.unflatten(0, (len(alpha), -1)), pos, unc, alpha
    parts = list(zip(*(t.split(n_labels) for t in sets), strict=True))
    field = args.taus, args.iters, args.floor
    whole = drift.sums_of_parts(partial(encode_labels, parts, encode, n_samples), *field)
    dx = []
    for x_n, *rest in parts:
        # with whole, the stats of every part are those of all
        d, stats = images_gradient(x_n.flatten(0, 1), *rest, encode, args, n_samples, whole)
        dx.append(d / len(parts))  # the loss is a mean over groups
    return torch.cat(dx), stats


def gradient(batch, args, forward, encode, n_labels, n_samples):
    """Adds the gradient of a step's loss to the parameters; returns stats of the drift.

    batch: of draw_batch(). n_labels, n_samples: how many of this rank's are worked on at a time.

    The drift acts on images, so the step is cut there: images of all parts, the gradient of the
    loss with respect to them, and part by part that of the generator. The graph of the last part is
    kept from the start, so that with one part nothing is done twice.
    """
    label, alpha, pos, unc, noise, style = batch
    inputs = noise, style, label.repeat_interleave(args.n_gen), alpha.repeat_interleave(args.n_gen)
    *parts, last = zip(*(t.split(n_samples) for t in inputs), strict=True)
    with torch.no_grad():
        x = [generate(forward, part) for part in parts]
    x_last = generate(forward, last)
    x = torch.cat([*x, x_last.detach()])
    dx, stats = images_gradient_by_labels(x, pos, unc, alpha, encode, args, n_samples, n_labels)
    *dx, dx_last = dx.split(n_samples)
    x_last.backward(dx_last)
    for part, d in zip(parts, dx, strict=True):
        generate(forward, part).backward(d)
    return stats


def schedule(step, args):
    """Share of the full rate: linear warm-up, constant, linear decay to zero; step from 0."""
    warmup = (step + 1) / max(args.warmup, 1)
    decay = (args.steps - step) / (args.decay * args.steps) if args.decay else 1
    return min(1, warmup, decay)


def update(step, args, params, averages, optimizers, stop):
    """One step of the optimiser and of the average of the weights.

    -> the norm of the gradient, and whether any rank has been told to stop. A gradient that is not
    finite leaves the weights as they are: the fused optimiser honours found_inf, as in mixed
    precision, so that nobody has to ask the GPU first.
    """
    for optimizer, lr in zip(optimizers, (args.lr, args.muon), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, args)
    if data.world_size() > 1:  # their shares of the labels are equal: the mean is that of all
        grads = [p.grad for p in params]
        told = torch.full_like(grads[0].flatten()[:1], bool(stop))
        flat = torch.cat([parameters_to_vector(grads), told])
        dist.all_reduce(flat)
        vector_to_parameters(flat[:-1] / data.world_size(), grads)
        stop = flat[-1]
    norm = clip_grad_norm_(params, 2.0)
    for optimizer in optimizers:
        if args.device.type in ("cpu", "cuda"):
            optimizer.found_inf = (~norm.isfinite()).float()
            optimizer.step()
        elif norm.isfinite():  # elsewhere found_inf is ignored
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        torch._foreach_lerp_(averages, params, 1 - args.ema)  # no bias correction, as the authors
    return norm, stop


def count_skipped(skipped, norm):
    """Steps without a finite gradient: all, the last in a row, the most in a row."""
    bad = (~norm.isfinite()).float()
    row = (skipped[1] + bad) * bad
    return torch.stack([skipped[0] + bad, row, torch.maximum(skipped[2], row)])


# Memory, signals, checkpoints


def part_size(n, most):
    """Samples of a part, at most so many, where n are cut into parts as equal as can be."""
    return math.ceil(n / math.ceil(n / max(1, most)))


def divisor(n, most):
    """The largest divisor of n that is at most so large, and at least 1."""
    return max(k for k in range(1, n + 1) if n % k == 0 and k <= max(1, most))


def choose_parts(args, labels, model, encode):
    """Labels and samples of a part, of this rank's labels: --label_batch and --micro_batch, or by
    the free memory of a GPU; elsewhere all."""
    n_labels, n_samples = args.label_batch or labels, args.micro_batch or labels * args.n_gen
    if args.device.type == "cuda":
        few = part_size(labels * args.n_gen, 16)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        noise, style = model.draw(few, torch.Generator(args.device))
        label, alpha = style[:, 0] % model.config.num_classes, torch.ones(few, device=args.device)
        found = encode(generate(model, (noise, style, label, alpha)))
        sum(f.float().sum() for f in found.values()).backward()
        model.zero_grad(set_to_none=True)
        activations = (torch.cuda.max_memory_allocated() - held) / few
        numbers = sum(f[0].numel() for f in found.values())
        # For all samples of a part the drift holds a handful of numbers for each of their features.
        per_sample = 6 + 2 * len(args.taus) + 2 * (args.n_pos + args.n_unc) / args.n_gen
        drift_bytes = 4 * numbers * args.n_gen * per_sample  # of a label
        # 10% and 4 GB are left for what comes and goes. No GPU has tried these estimates, which
        # --label_batch and --micro_batch overrule.
        free = 0.9 * torch.cuda.mem_get_info()[0] - 2**32
        n_labels = divisor(labels, args.label_batch or int(0.8 * free / drift_bytes))
        n_samples = args.micro_batch or int((free - n_labels * drift_bytes) / activations)
    n_labels = divisor(labels, n_labels)  # equal parts, so that the mean of theirs is that of all
    return n_labels, part_size(n_labels * args.n_gen, n_samples)


@contextmanager
def enough_memory(args, when):
    """A lack of memory is one line that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        per_rank = args.labels // data.world_size()
        now = f"now {args.micro_batch} and {args.label_batch}"
        how = f"give --micro_batch and --label_batch, {now}, or lower --n_gen or --labels"
        sys.exit(f"{when}: not enough memory for {per_rank} x {args.n_gen} samples: {how}")


class Stop:
    """Ctrl-C and SIGTERM: the first is remembered until the step has ended (on several GPUs the
    next tenth step, when they look), the second acts at once."""

    def __init__(self):
        self.signal = 0
        self.training = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.training and not self.signal:
            self.signal = number
            return
        when = "at once" if self.training else "before the first step"
        print(f"stopped {when}: the same command begins again, or goes on by --resume", flush=True)
        sys.exit(130 if number == signal.SIGINT else 0)


def light(out):
    """The name of the averaged weights in half precision."""
    return out.with_name(f"{out.stem}.ema{out.suffix}")


def save(step, args, names, model, ema, optimizers):
    """Writes the checkpoint and keeps the one before it.

    If that fails: a line, and False; the old one is still there.
    """
    out = Path(args.out)
    common = {"args": to_store(args), "config": asdict(model.config), "classes": names}
    full = {"model": model.state_dict(), "ema": ema.state_dict(), "step": step}
    full["optimizer"], *muon = [optimizer.state_dict() for optimizer in optimizers]
    full["muon"] = muon  # none or one
    half = {"ema": {name: value.half() for name, value in ema.state_dict().items()}}
    try:
        if out.exists():
            previous(out).unlink(missing_ok=True)
            with suppress(OSError):  # some file systems have no links
                os.link(out, previous(out))  # a second name, until out is replaced
        with data.whole(out) as file:
            torch.save(common | full, file)
        with data.whole(light(out)) as file:
            torch.save(common | half, file)
        return True
    except OSError as error:
        again = "what is there stays, the next log line tries again"
        print(f"step {step}: cannot write {out} ({error}); {again}", file=sys.stderr, flush=True)
        return False


def to_store(args):
    """The arguments that a checkpoint keeps."""
    dropped = ("resume", "stop_after", "device")
    return {k: v for k, v in vars(args).items() if k not in dropped}


# Scores


class Scores:
    """Compares samples of the averaged weights with real images. All ranks draw, one looks."""

    def __init__(self, args, images, labels):
        self.args = args
        self.out = Path(args.out).with_name("samples.png")
        self.shown = images.shape[1] in (1, 3)
        self.of_real = {}
        self.vae = None
        if args.fid_every:
            if args.floats:
                raise ValueError(f"--fid_every needs images of 8 bits, {args.dataset} has others")
            self.inception = fid.Inception(device=args.device)
        if data.rank() > 0:
            return
        n = min(10000, 2**28 // images[0].numel(), len(images))  # at most 1 GB
        some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]
        self.real = data.to_float(images[some].to(args.device))
        self.labels = labels[some].to(args.device)
        if args.vae:
            self.vae = latents.load_vae(args.vae, args.device, images.shape[1])
        elif not self.shown:
            data.say(f"no pictures of {images.shape[1]} channels; --vae decodes latents for them")
        half = min(N_EVAL, n // 2)
        a, b = (self.real[:half], self.labels[:half]), (self.real[half:], self.labels[half:])
        self.of_real = fid.scores(*a, *b)
        self.real_text = f"({half} real, against {n - half} others)"
        if args.fid_every:
            self.reference = fid.reference(images, args.dataset, self.inception, args.data_dir)

    def samples(self, ema, n):
        """This rank's batches of n images, classes in turn; the same images on any number."""
        generator = torch.Generator().manual_seed(self.args.seed)
        label = torch.arange(n, device=self.args.device) % ema.config.num_classes
        for i, part in enumerate(label.split(250)):
            if i % data.world_size() == data.rank():
                x = ema.generate(part, 1.0, generator)
                yield x if self.args.floats else data.to_uint8(x)
            else:
                for _ in part:
                    ema.draw(1, generator)  # another rank's noise

    def print(self, step, ema):
        """Judges samples; a dictionary of scores, {} on other ranks than the first."""
        batches = data.gather([x.cpu() for x in self.samples(ema, N_EVAL)])
        if data.rank() > 0:
            return {}
        fake = torch.cat(batches).to(self.args.device)
        classes = ema.config.num_classes
        try:
            if self.shown or self.vae:
                pictures = latents.decode(self.vae, fake[:100]) if self.vae else fake[:100]
                columns = min(10, classes) if classes > 1 else 10
                data.save_grid(data.to_uint8(pictures), self.out, columns)
        except OSError as error:  # no room for a picture is not the end of a run
            print(f"cannot write {self.out} ({error})", file=sys.stderr, flush=True)
        label = torch.arange(len(fake), device=self.args.device) % classes
        score = fid.scores(data.to_float(fake), label, self.real, self.labels)
        real = f"{len(fake)} at alpha 1, against {len(self.real)} real"
        data.say(f"{step:6d}  {fid.score_text(score)}  ({real})")
        data.say(f"  real  {fid.score_text(self.of_real)}  {self.real_text}")
        return score

    def print_fid(self, step, ema):
        """The same by the Inception network."""
        n = N_FID // data.world_size()
        f, p = fid.extract(self.samples(ema, N_FID), n, self.inception)
        parts = f.split(250), f.split(250) if p is None else p.split(250)
        found = data.gather(list(zip(*parts, strict=True)))
        if data.rank() > 0:
            return {}
        f, p = zip(*found, strict=True)
        p = torch.cat(p) if self.inception.original else None
        score = fid.compare(torch.cat(f), p, self.inception, self.reference)
        data.say(f"{step:6d}  {fid.text(score)}")
        return score


def by_encoder(stats):
    """Stats {feature: [taus + 1]} of a drift: the mean of all, and of each encoder's, {encoder: }.

    A feature of pixels has no encoder before its name; with pixels alone there is the mean alone.
    """
    rows = {"": list(stats.values())}
    for name, row in stats.items():
        rows.setdefault(name.rpartition(".")[0] or "pixels", []).append(row)
    if len(rows) == 2:  # pixels alone
        del rows["pixels"]
    return {name: torch.stack(row).mean(0) for name, row in rows.items()}


def drift_numbers(stats, taus, prefix=""):
    """What the log says of by_encoder()."""
    numbers = {}
    names = [*(f"drift_{tau}" for tau in taus), "scale"]
    for encoder, row in stats.items():
        for name, number in zip(names, row.tolist(), strict=True):
            numbers[f"{prefix}{encoder}.{name}" if encoder else prefix + name] = number
    return numbers


def drift_text(stats, taus):
    *drifts, scale = stats[""].tolist()
    drifts = " ".join(f"{tau}:{value:.2e}" for tau, value in zip(taus, drifts, strict=True))
    return f"drift {drifts}  scale {scale:.3f}"


def report(log, seen, stats, norm, speed, left, skipped, args):
    """A line of the training, for people and for the log; speed in steps per second, left in s."""
    images_per_s = speed * args.labels * args.n_gen
    line = f"{seen['step']:6d}  {drift_text(stats, args.taus)}  grad {norm:.2f}"
    line += f"  {images_per_s:,.0f} images/s  {timedelta(seconds=int(left))} left"
    data.say(line + (f"  {skipped:.0f} steps skipped" if skipped else ""))
    log.write(
        **seen,
        **drift_numbers(stats, args.taus),
        grad_norm=norm.item(),
        lr=args.lr * schedule(seen["step"] - 1, args),
        images_per_s=images_per_s,
        memory_gb=peak_memory(args.device),
    )


def peak_memory(device):
    """GB that this process has held at most: on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return float("nan")
    import resource

    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# Setting up


def load_data(args, checkpoint):
    """-> images, labels, names of the classes, and the generator of --init, if there is one."""
    with data.node_first():
        initial = DiT.load(args.init)[0] if args.init and not checkpoint else None
        if initial:
            args.size, args.patch = initial.config.input_size, initial.config.patch_size
        images, labels, names = data.load(args.dataset, args.data_dir, args.size)
    if args.vae and args.dataset.startswith("latents:"):
        made_by = latents.load(args.dataset[8:])[3]["vae"]
        if made_by != args.vae:
            raise ValueError(f"{args.dataset} is of the autoencoder {made_by}, not {args.vae}")
    args.size, args.floats = images.shape[-1], images.is_floating_point()
    if args.unconditional:
        labels, names = torch.zeros_like(labels), ["all"]
    count = labels.bincount(minlength=len(names))
    if count.min() < args.n_pos:
        few = f"class {names[count.argmin()]!r} has {count.min()} images"
        raise ValueError(f"{few}, and a step draws {args.n_pos}: lower --n_pos or add images")
    return images, labels, names, initial


def build_model(args, checkpoint, initial, channels, names):
    """The generator to train: of a resumed checkpoint, of --init with a class table, or new."""
    torch.manual_seed(args.seed)
    if checkpoint:
        old = set(checkpoint.get("classes", names))
        if old != set(names):
            one = min(old ^ set(names))
            raise ValueError(
                f"--dataset {args.dataset} has other classes than then, such as {one!r}"
            )
        return checkpoint["net"]
    if not initial:
        shape = dict(input_size=args.size, in_channels=channels, patch_size=args.patch)
        return DiT(DiTConfig.named(args.model, **shape, num_classes=len(names)))
    if initial.config.in_channels != channels:
        given = f"{args.init} gives {initial.config.in_channels} channels"
        raise ValueError(f"{given}, the images of {args.dataset} have {channels}")
    old = initial.config.num_classes
    if old != len(names):
        data.say(f"class table: {len(names)} new rows, each the mean of the {old} old ones")
        initial.resize_classes(len(names))
    return initial


def build_encoder(args, sampler, num_classes):
    """--encoder as a function; trains the ResNet-MAE of the data first if it is missing."""
    channels, size = sampler.images.shape[-3:-1]
    names = args.encoder.split(",")
    spaces = args.pools, args.windows, args.edges, args.encoder_size
    if "mae" in names:
        width, plan, least = 32, {}, 14  # minutes of a CPU
        if sampler.device.type == "cuda":  # minutes of a large GPU
            width, plan, least = 64, dict(layers=(3, 4, 6, 3), steps=20000, batch=512), 28
        place = args.dataset.partition(":")[2] or args.dataset
        name = Path(place).resolve().name.removesuffix(".npz")
        path = Path(args.data_dir) / f"mae_{name}_{size}_{width}.pt"
        if not path.exists():
            others = ",".join(name for name in names if name != "mae")
            with data.node_first():  # if the others cannot be had, say so before training
                features.Encoder(others or "pixels", channels, size, *spaces)
            data.say(f"training an encoder first, {path}; --encoder FILE.pt takes another")
        # the largest patches that leave so many locations across, as far as there are pixels
        fits = [k for k in range(1, size) if size % k == 0 and size // k >= least]
        patch = max(fits, default=1)
        mae.train_mae(path, sampler, num_classes, width=width, patch=patch, **plan)
        names = [str(path) if name == "mae" else name for name in names]
    spec, device = ",".join(names), sampler.device
    with data.node_first():
        encode = features.Encoder(spec, channels, size, *spaces, device)
    timm = any(isinstance(net, features.Timm) for net in encode.nets)
    if args.deterministic and device.type == "cuda" and timm:
        raise ValueError("--deterministic: torch resizes images for timm otherwise on a GPU")
    return encode


def build_optimizers(args, checkpoint, model):
    """AdamW, and Muon for the matrices of the blocks if --muon says so; the average of the
    weights."""
    ema = deepcopy(model).requires_grad_(False)
    matrices = []
    if args.muon:
        named = model.blocks.named_parameters()
        matrices = [p for name, p in named if p.ndim == 2 and "adaln" not in name]
    chosen = set(matrices)
    rest = [p for p in model.parameters() if p not in chosen]
    optimizers = [torch.optim.AdamW(rest, args.lr, (0.9, 0.95), weight_decay=args.wd, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, args.muon, weight_decay=args.wd))
    if checkpoint:
        try:
            ema.load_state_dict(checkpoint["ema"])
            states = [checkpoint["optimizer"], *checkpoint.get("muon", [])]
            for optimizer, state in zip(optimizers, states, strict=True):
                optimizer.load_state_dict(state)
        except Exception as error:  # of a file that train.py has not written
            wrong = f"{args.resume} ({type(error).__name__})"
            raise ValueError(f"cannot resume from {wrong}: it does not fit itself") from None
    return optimizers, ema


def start_log(args, start):
    """The log beside --out. It must be this run's own: of the same arguments or, with --resume, of
    those that a resumed run keeps."""
    stored = to_store(args)
    own = [*FIXED, "seed"] if args.resume else [k for k in stored if k not in ("command", "wandb")]
    first = dict(run=os.urandom(4).hex(), torch=torch.__version__, device=str(args.device))
    first |= dict(commit=commit(), **stored)
    return Log(Path(args.out).with_suffix(".jsonl"), first, start, own, args.wandb)


def tidy(args, checkpoint):
    """Makes room for --out: its folder; no leftovers of a killed run, no damaged file."""
    out = Path(args.out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder: --out names the checkpoint file")
    if out.suffix != ".pt" or out.name == "samples.pt":
        raise ValueError(f"--out {out}: name a .pt, but not samples.pt; other files go beside it")
    out.parent.mkdir(parents=True, exist_ok=True)
    if data.rank() == 0:
        for name in (out.name, light(out).name):
            for part in out.parent.glob(f"{name}.*.tmp"):
                part.unlink()
        if checkpoint and checkpoint["damaged"] and out.exists():
            os.replace(out, f"{out}.damaged")


def announce(args, images, names, params, n_labels, n_samples):
    data.say("  ".join(f"{k}={v}" for k, v in to_store(args).items()))
    data.say(f"{len(images):,} images of {len(names)} classes, {data.world_size()} x {args.device}")
    parameters = sum(p.numel() for p in params) / 1e6
    plan = f"{args.labels} x {args.n_gen} samples a step"
    parts = f"{n_labels} labels and {n_samples} samples at a time on a rank"
    data.say(f"{parameters:.2f}M parameters, {plan}, {parts}")


@torch.no_grad()
def real_drift(args, mine, sampler, encode, n_samples):
    """Stats of the drift of real images in the place of samples: what it can fall to at alpha 1."""
    label = torch.arange(args.labels, device=sampler.home) % len(sampler.count)
    generator = torch.Generator(sampler.home).manual_seed(0)
    both, unc = sampler.draw(label, args.n_gen + args.n_pos, args.n_unc, generator, mine)
    x, pos = both.split([args.n_gen, args.n_pos], dim=1)
    fx, fp, fu = encode_all(encode, n_samples, x, pos, unc)
    one = torch.ones(len(x), device=sampler.device)
    stats = drift.features_drift(fx, fp, fu, one, args.taus, args.iters, args.floor)[2]
    return by_encoder(stats)


def main(argv=None):
    args, checkpoint = parse(argv)
    stop = Stop()
    torch.set_flush_denormal(True)  # exp() of far pairs gives some, slow on some CPUs
    data.start_ranks(args.device)
    world, device = data.world_size(), args.device
    if args.labels % world:
        args.labels += -args.labels % world
        data.say(f"labels: {args.labels}, a multiple of {world} ranks")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or its products are refused
        torch.use_deterministic_algorithms(True)
    if args.resume == "auto" and not checkpoint:
        data.say(f"no {args.out} to resume: a new start")

    # What a user can get wrong is found here, before anything is written.
    images, labels, names, initial = load_data(args, checkpoint)
    model = build_model(args, checkpoint, initial, images.shape[-3], names).to(device)
    optimizers, ema = build_optimizers(args, checkpoint, model)
    start = checkpoint["step"] if checkpoint else 0
    tidy(args, checkpoint)
    log = start_log(args, start)
    sampler = data.Sampler(data.views(images), labels, device, args.flip)
    encode = build_encoder(args, sampler, len(names))
    scores = Scores(args, images[:, 0] if images.ndim == 5 else images, labels)
    data.wait()  # the first rank may be at a reference of FID
    params, averages = list(model.parameters()), list(ema.parameters())

    per_rank = args.labels // world
    mine = slice(data.rank() * per_rank, (data.rank() + 1) * per_rank)  # this rank's labels
    forward, compiled = model, device.type == "cuda" if args.compile is None else args.compile
    with enough_memory(args, "before the first step"):
        n_labels, n_samples = choose_parts(args, per_rank, model, encode)
        if compiled:
            forward = torch.compile(model, dynamic=False)
            encode = torch.compile(encode, dynamic=False)
            # where normalised_drift() finds it; dynamic, as features differ in their groups
            drift.field_weights = torch.compile(drift.field_weights, dynamic=True)
        announce(args, images, names, params, n_labels, n_samples)
        real = {f"real_{name}": score for name, score in scores.of_real.items()}
        if sampler.fewest >= args.n_gen + args.n_pos:
            some = slice(mine.start, mine.start + n_labels)  # as many as are held at a time
            stats = real_drift(args, some, sampler, encode, n_samples)
            data.say(f"  real  {drift_text(stats, args.taus)}")
            real |= drift_numbers(stats, args.taus, "real_")
        log.write(step=start, **real)

    end = max(start, min(args.steps, args.stop_after or args.steps))
    began = time.time()
    total, since, then = {}, start, began  # of the drift's stats, since that step and that moment
    skipped = torch.zeros(3, device=device)
    unsaved = stopping = False
    stop.training = True
    draw = partial(draw_batch, args=args, sampler=sampler, model=model, mine=mine)
    for step, batch in one_ahead(draw, start, end, sampler.home != device):
        done = step + 1
        with enough_memory(args, f"step {done}"):
            stats = gradient(batch, args, forward, encode, n_labels, n_samples)
        norm, told_to_stop = update(step, args, params, averages, optimizers, stop.signal)
        total = {name: total.get(name, 0) + row for name, row in stats.items()}
        skipped = count_skipped(skipped, norm)

        # full: scores and a checkpoint are due; measure: FID; tell: a line of the log
        full = done % args.eval_every == 0 or done == end
        measure = args.fid_every and done % args.fid_every == 0
        tell = done % args.log_every == 0 or done == start + 1 or full
        look = tell or measure or done % 10 == 0  # to look is to wait for the GPU
        if not look and world > 1 and device.type != "cpu":
            continue
        stopping = bool(told_to_stop)
        if look and skipped[2] >= 10:
            kept = f"{args.out} keeps the last checkpoint; lower --lr {args.lr:g}"
            sys.exit(f"step {done}: ten gradients in a row were not finite. {kept}")
        seen = dict(step=done, images=done * args.labels * args.n_gen, seconds=time.time() - began)
        if tell or stopping:
            stats = {name: row / (done - since) for name, row in total.items()}
            speed = (done - since) / (time.time() - then)  # steps per second
            report(log, seen, stats, norm, speed, (end - done) / speed, skipped[0], args)
            total, since, then = {}, done, time.time()
        if data.rank() == 0 and (full or stopping or (unsaved and tell)):
            unsaved = not save(done, args, names, model, ema, optimizers)
        if stopping:
            data.say(f"stopped after step {done}; go on with --resume {args.out}")
            break
        if full:
            log.write(**seen, **scores.print(done, ema))
        if measure:
            log.write(**seen, **scores.print_fid(done, ema))
        if full or measure:
            log.draw()
            total, since, then = {}, done, time.time()  # not a part of the speed
    if not stopping:
        memory = f"{peak_memory(device):.2f} GB"
        data.say(f"{end - start} steps in {time.time() - began:.0f} s, {memory}: {args.out}")
    data.finish()
    if unsaved:
        sys.exit(f"the last steps are not in {args.out}: make room on the disk and --resume")
    if stopping and stop.signal == signal.SIGINT:
        sys.exit(130)


if __name__ == "__main__":
    data.run(main)
