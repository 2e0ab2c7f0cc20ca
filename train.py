"""
Trains a one-step generator by drifting: writes out.pt, out.png (samples) and out.jsonl (log).

$ python train.py                                           # 8 x 8 digits, a minute or two
$ python train.py --dataset mnist --out mnist.pt            # flags override the preset
$ python train.py --dataset folder:flowers --out flowers.pt
$ torchrun --standalone --nproc_per_node=8 train.py --dataset cifar10 --out cifar10.pt
$ python train.py --dataset cifar10 --resume auto --out long.pt     # starts, or resumes
"""

import argparse
import json
import os
import signal
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint as recompute

import data
import drift
import features
import fid
import mae
import model
from model import SIZES, DiT, DiTConfig
from muon import Muon


@dataclass
class Settings:  # Annotated[type, meaning, least value]
    dataset: Annotated[str, "digits mnist fashion cifar10 cifar10-cpu folder:PATH ..."] = "digits"
    data_dir: Annotated[str, "where data sets are, or are downloaded to"] = "data"
    size: Annotated[int, "image size in pixels; 0: the data set's own", 0] = 0
    flip: Annotated[bool, "mirror half of the images"] = False
    unconditional: Annotated[bool, "no labels: one group, no guidance"] = False

    encoder: Annotated[list[str], "spaces of the drift, see features.py"] = ("pixels",)

    init: Annotated[str, "checkpoint of a generator to start from"] = ""
    model: Annotated[str, "generator: " + " ".join(SIZES)] = "tiny"
    patch: Annotated[int, "patch size of the generator, in pixels", 1] = 4

    labels: Annotated[int, "in a step, a multiple of the ranks", 1] = 10
    n_gen: Annotated[int, "samples per label", 2] = 32
    n_pos: Annotated[int, "real images per label", 1] = 32
    n_unc: Annotated[int, "real images of any class per label, for guidance", 0] = 8
    micro_batch: Annotated[int, "images at a time, to save memory; 0: all", 0] = 0

    taus: Annotated[list[float], "kernel widths, in units of the mean distance", 1e-6] = drift.TAUS
    iters: Annotated[int, "how often the softmaxes are averaged; Algorithm 2: 1", 1] = 2
    floor: Annotated[float, "least product of the softmaxes; official: 1e-6", 0] = 0.0
    alpha_max: Annotated[float, "guidance alpha is drawn from 1 to this", 1] = 4.0
    alpha_k: Annotated[float, "density of alpha: alpha^-k, k not 1"] = 3.0
    alpha_one: Annotated[float, "share of labels without guidance", 0] = 0.5

    steps: Annotated[int, "in all, resumed ones included", 1] = 600
    stop_after: Annotated[int, "end at this step; the rates still follow --steps", 0] = 0
    lr: Annotated[float, "learning rate of AdamW", 0] = 3e-3
    muon: Annotated[float, "rate of Muon, for the blocks' matrices; 0: AdamW", 0] = 0.0
    warmup: Annotated[int, "steps to the full rates", 0] = 50
    decay: Annotated[float, "last share of the steps, over which the rates fall to 0", 0] = 0.4
    wd: Annotated[float, "weight decay, of all parameters", 0] = 0.01
    ema: Annotated[float, "decay of the average of the weights", 0] = 0.99

    seed: Annotated[int, "of all random numbers", 0] = 0
    compile: Annotated[bool, "by torch.compile; if not given: on CUDA"] = None
    device: Annotated[str, "cpu, cuda, mps"] = "cuda" if torch.cuda.is_available() else "cpu"
    log_every: Annotated[int, "steps to a line of the log", 1] = 100
    eval_every: Annotated[int, "steps to scores, samples and a checkpoint", 1] = 1000
    out: Annotated[str, "checkpoint; log and samples are named after it"] = "out.pt"
    resume: Annotated[str, "checkpoint to go on from; auto: --out, if it is there"] = ""
    wandb: Annotated[str, "project of Weights & Biases that gets the log, too"] = ""


MNIST = dict(encoder=["pixels", "pool:2", "pool:4", "window:8"], patch=7, n_pos=128, n_unc=32)
MNIST |= dict(muon=0.02, steps=1600)
PHOTOS = dict(encoder=["pixels", "mae"], steps=5000, ema=0.999)
PRESETS = {  # by data set: what differs from the defaults
    "digits": dict(n_pos=128, muon=0.02, alpha_one=0.85, log_every=50, eval_every=300),
    "mnist": MNIST,
    "fashion": MNIST,
    "cifar10": dict(encoder=["pixels", "pool:2", "pool:4", "mae"], model="S", patch=2, flip=True)
    | dict(labels=5, n_gen=128, n_pos=256, n_unc=0, muon=0.02, lr=1e-3, warmup=100)
    | dict(steps=100000, ema=0.999, eval_every=5000),
    "cifar10-cpu": dict(dataset="cifar10", patch=2, flip=True, n_pos=64, n_unc=0, muon=0.02)
    | dict(encoder=["pixels", "pool:2", "pool:4", "timm:mobilenetv2_100@64"])
    | dict(steps=1100, log_every=25, eval_every=100),
    "folder": PHOTOS | dict(size=64, patch=8, flip=True),
    "npz": PHOTOS,
    "latents": PHOTOS | dict(encoder=["mae"], patch=2),
}
N_EVAL = 1000  # samples that are scored


def parse(argv=None):
    """-> Settings, what was typed of them, and the checkpoint to resume, or None. ValueError.

    What is typed goes before a resumed checkpoint's settings, a preset's and the defaults.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    hints = get_type_hints(Settings, include_extras=True)
    for name, hint in hints.items():
        kind, meaning = get_args(hint)[:2]
        how = dict(type=kind)
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif get_args(kind):  # a list
            how = dict(type=get_args(kind)[0], nargs="+")
        meaning = f"{meaning} [{getattr(Settings, name)}]"
        parser.add_argument(f"--{name}", help=meaning, default=argparse.SUPPRESS, **how)
    typed = vars(parser.parse_args(argv))

    preset = PRESETS.get(typed.get("dataset", Settings.dataset).partition(":")[0], {})
    if "dataset" in preset:
        typed["dataset"] = preset["dataset"]
    path, stored = typed.get("resume", ""), None
    if path == "auto":
        path = typed.get("out", Settings.out)
    if path and (Path(path).exists() or typed["resume"] != "auto"):
        stored = model.load(path)[1]
        preset = {name: value for name, value in stored["args"].items() if name in hints}
        preset |= dict(out=path, stop_after=0, device=Settings.device)
    args = Settings(**preset | typed)
    for name, hint in hints.items():
        value = getattr(args, name)
        for least in get_args(hint)[2:]:
            if not least <= (min(value) if name == "taus" else value) < float("inf"):
                raise ValueError(f"--{name} {value} must be at least {least}")
    return args, typed, stored


def prepare(argv, rank, world):
    """What a run needs before its first step. Raises ValueError and others for what is wrong."""
    args, typed, stored = parse(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    if rank > 0:
        dist.barrier()  # the first rank downloads, reads and trains an encoder for all
    source = stored or (model.load(args.init)[1] if args.init else None)
    if source and "size" not in typed:
        args.size = source["config"]["input_size"]
    images, labels, names = data.load(args.dataset, args.data_dir, args.size)
    if args.unconditional or len(names) == 1:
        if not stored:  # the samples of all labels become one large group
            args.n_gen *= 1 if "n_gen" in typed else args.labels
            args.n_pos *= 1 if "n_pos" in typed else args.labels
        args.labels, args.n_unc = world, 0  # a group on every rank
        labels, names = torch.zeros_like(labels), ["all"]
    if not args.n_unc:
        args.alpha_max = 1.0  # no unconditional images, no guidance
    count = labels.bincount(minlength=len(names))
    if count.min() < args.n_pos:
        few = f"class {names[count.argmin()]} has {count.min()} images, --n_pos is {args.n_pos}"
        if "n_pos" in typed:
            raise ValueError(few)
        print(f"{few}: now {count.min()}")
        args.n_pos = int(count.min())
    if args.labels % world and "labels" in typed:
        raise ValueError(f"--labels {args.labels} is no multiple of {world} ranks")
    args.labels += -args.labels % world

    torch.manual_seed(args.seed)
    shape = dict(in_channels=images.shape[-3], input_size=images.shape[-1], num_classes=len(names))
    config = DiTConfig.named(args.model, patch_size=args.patch, **shape)
    if source and not typed.keys() & {"model", "patch"}:
        config = replace(DiTConfig(**source["config"]), **shape)
    net = DiT(config)
    if source:
        weights = source["model" if stored else "ema"]
        if not stored:  # other classes: each begins as the mean of those of --init
            table = weights["label_embed.weight"].mean(0, keepdim=True).repeat(len(names), 1)
            weights["label_embed.weight"] = table
        net.load_state_dict(weights)

    sampler = data.Sampler(images, labels, device, args.flip)
    encoders = list(args.encoder)
    if "mae" in encoders:
        encoders[encoders.index("mae")] = mae.of_data(sampler, len(names), args.data_dir)
    encode = features.Encoder(encoders, images.shape[-3], images.shape[-1], device)
    if rank == 0 and world > 1:
        dist.barrier()
    return args, stored, names, net.to(device), sampler, encode


def build_optimizers(args, net, stored):
    """AdamW; and Muon for the matrices of the blocks, if --muon says so."""
    named = net.blocks.named_parameters() if args.muon else []
    matrices = [p for name, p in named if p.ndim == 2 and "adaln" not in name]
    chosen = set(matrices)
    rest = [p for p in net.parameters() if p not in chosen]
    optimizers = [torch.optim.AdamW(rest, args.lr, (0.9, 0.95), fused=True)]
    if args.muon:
        optimizers.append(Muon(matrices, args.muon))
    if stored and "optimizer" in stored and bool(stored["muon"]) == bool(args.muon):
        for optimizer, name in zip(optimizers, ("optimizer", "muon"), strict=False):
            optimizer.load_state_dict(stored[name])
    return optimizers


def draw_labels(n, classes, g):
    """Labels [n]: shuffled passes over all classes."""
    lot = torch.rand(-(-n // classes), classes, generator=g, device=g.device)
    return lot.argsort(1).flatten()[:n]


def draw_alpha(n, args, g):
    """Guidance strengths [n]: 1 for a share of them, else on [1, alpha_max] as alpha^-k."""
    u = torch.rand(2, n, generator=g, device=g.device)
    p = 1 - args.alpha_k
    alpha = (1 + u[0] * (args.alpha_max**p - 1)) ** (1 / p)  # inverse of the CDF
    return torch.where(u[1] < args.alpha_one, 1.0, alpha)


def in_parts(f, size, *inputs):
    """f(*inputs), a dictionary of tensors [B, ...], by at most `size` rows at a time; 0: all.

    The backward pass computes a part again, so that activations of one part alone are held.
    """
    if not size:
        return f(*inputs)
    parts = zip(*(t.split(size) for t in inputs), strict=True)
    parts = [recompute(f, *part, use_reentrant=False) for part in parts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def rate(step, args):
    """Share of the full rates: linear warm-up, constant, linear decay to zero; step from 0."""
    warmup = (step + 1) / max(args.warmup, 1)
    decay = (args.steps - step) / (args.decay * args.steps) if args.decay else 1
    return min(1, warmup, decay)


def average_gradients(params, stop):
    """Over the ranks, in one reduction; -> whether any rank has got a signal to stop."""
    grads = [p.grad for p in params]
    flat = torch.cat([parameters_to_vector(grads), grads[0].new_tensor([stop])])
    dist.all_reduce(flat)
    vector_to_parameters(flat[:-1] / dist.get_world_size(), grads)
    return bool(flat[-1] > 0)


def save(out, net, ema, optimizers, args, names, step):
    """A checkpoint for sample.py and --resume, renamed when complete."""
    state = dict(model=net.state_dict(), ema=ema.state_dict(), step=step, args=asdict(args))
    state |= dict(config=asdict(net.config), classes=names)
    adamw, *muon = [optimizer.state_dict() for optimizer in optimizers]
    torch.save(state | dict(optimizer=adamw, muon=muon[0] if muon else None), f"{out}.tmp")
    os.replace(f"{out}.tmp", out)


def evaluate(ema, picture, real, real_labels):
    """Scores of samples at alpha 1 against real images, and a picture of a hundred of them."""
    classes = ema.config.num_classes
    label = torch.arange(N_EVAL, device=real.device) % classes
    g = torch.Generator().manual_seed(0)
    x = torch.cat([ema.generate(part, 1.0, g) for part in label.split(250)])
    x = x.clamp(real.min(), real.max())
    if x.shape[1] in (1, 3):
        data.save_grid(data.to_uint8(x[:100]), picture, min(10, classes) if classes > 1 else 10)
    return fid.scores(x, label, real, real_labels) if len(real) > 20 else {}


def main(argv=None):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        args, stored, names, net, sampler, encode = prepare(argv, rank, world)
        if args.wandb and rank == 0:
            import wandb

            wandb.init(project=args.wandb, config=asdict(args))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"train.py: error: {' '.join(str(error).split())}")
    torch.set_flush_denormal(True)  # exp() of far pairs gives denormals, slow on some CPUs
    device, out, start = sampler.device, Path(args.out), stored["step"] if stored else 0
    optimizers, ema = build_optimizers(args, net, stored), deepcopy(net).requires_grad_(False)
    if stored:
        ema.load_state_dict(stored["ema"])
    params, averages = list(net.parameters()), list(ema.parameters())

    def log(**numbers):
        short = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in numbers.items()}
        print("  ".join(f"{k} {v}" for k, v in short.items()), flush=True)
        with out.with_suffix(".jsonl").open("a") as file:
            file.write(json.dumps(numbers) + "\n")
        if args.wandb:
            wandb.log(numbers)

    if rank == 0:
        if out.exists() and not stored:
            print(f"{out} of an earlier run is overwritten, with its log and picture")
            out.with_suffix(".jsonl").unlink(missing_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        log(**asdict(args))
        print(f"{len(sampler.labels):,} images; classes {', '.join(names)}; {world} x {device}")
        most = min(10000, 2**28 // sampler.images[0, 0].numel())  # at most a gigabyte
        some = torch.randperm(len(sampler.labels), generator=torch.Generator().manual_seed(0))
        some = some[:most].to(device)
        real = sampler.fetch(some, torch.full(some.shape, 0.5, device=device))  # not mirrored
        real_labels = sampler.labels[some]
        half = min(N_EVAL, len(real) // 2)
        if half > 20:  # what real images reach in the place of samples
            found = fid.scores(real[:half], real_labels[:half], real[half:], real_labels[half:])
            log(**{f"real_{name}": value for name, value in found.items()})

    forward = net
    compiled = device.type == "cuda" if args.compile is None else args.compile
    if compiled:
        try:
            torch.compile(torch.exp)(torch.ones(1, device=device))
        except Exception as error:  # of a missing compiler or Triton
            sys.exit(f"train.py: error: torch.compile fails ({str(error)[:80]!r}): --no-compile")
        forward, encode = torch.compile(net, dynamic=False), torch.compile(encode, dynamic=False)
        drift.field = torch.compile(drift.field, dynamic=True)  # drift_loss calls it by this name

    def generate_and_encode(noise, style, label, alpha):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            x = forward(noise, style, label, alpha)
        return encode(x.to(noise.dtype))

    def encode_real(pos, unc):
        images = torch.cat([pos.flatten(0, 1), unc.flatten(0, 1)])  # together, as unc may be empty
        with torch.no_grad():
            feats = in_parts(encode, args.micro_batch, images)
        n = pos.shape[0] * pos.shape[1]
        return {k: f[:n] for k, f in feats.items()}, {k: f[n:] for k, f in feats.items()}

    stop = []  # signals: the step ends, a checkpoint is written, the run ends
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, signal.SIGTERM)  # Windows has two of them
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, frame: stop.append(number))
    batch, per_rank = args.labels * args.n_gen, args.labels // world
    mine = slice(rank * per_rank, (rank + 1) * per_rank)  # this rank's labels
    stat_names = [*(f"drift_{tau:g}" for tau in args.taus), "scale"]
    end = min(args.steps, args.stop_after or args.steps)
    if start >= end:
        print(f"{out} is at step {start} of {end} already: give more --steps")
    began, then, since = time.time(), time.time(), start
    for step in range(start, end):
        g = torch.Generator(device).manual_seed(10_000_019 * args.seed + step)  # of all ranks
        label = draw_labels(args.labels, len(names), g)
        alpha = draw_alpha(args.labels, args, g)[mine]
        pos, unc = sampler.draw(label, args.n_pos, args.n_unc, g, mine)
        # style is a second, discrete noise, see model.py
        noise, style = (t.chunk(world)[rank] for t in net.draw(batch, g))
        each = [t.repeat_interleave(args.n_gen) for t in (label[mine], alpha)]

        fx = in_parts(generate_and_encode, args.micro_batch, noise, style, *each)
        fp, fu = encode_real(pos, unc)
        loss, stats = drift.features_loss(fx, fp, fu, alpha, args.taus, args.iters, args.floor)
        loss.backward()
        stopping = average_gradients(params, bool(stop)) if world > 1 else bool(stop)
        norm = clip_grad_norm_(params, 2.0)
        for optimizer, full in zip(optimizers, (args.lr, args.muon), strict=False):
            for group in optimizer.param_groups:
                group.update(lr=full * rate(step, args), weight_decay=args.wd)
            if norm.isfinite():  # else this step is left out
                optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 1 - args.ema)

        done = step + 1
        last = done == end or stopping
        seen = dict(step=done, images=done * batch, seconds=int(time.time() - began))
        if rank == 0 and (done % args.log_every == 0 or done == start + 1 or last):
            means = torch.stack(list(stats.values())).mean(0).tolist()  # over features
            numbers = dict(zip(stat_names, means, strict=True))
            numbers |= dict(grad_norm=norm.item(), lr=args.lr * rate(step, args))
            speed = (done - since) * batch / (time.time() - then)
            log(**seen, **numbers, images_per_s=int(speed))
            since, then = done, time.time()
        if rank == 0 and (done % args.eval_every == 0 or last):
            save(out, net, ema, optimizers, args, names, done)
            log(**seen, **evaluate(ema, out.with_suffix(".png"), real, real_labels))
            since, then = done, time.time()
        if stopping:
            break
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
