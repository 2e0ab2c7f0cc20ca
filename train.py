"""Trains a one-step generator by drifting: writes out.pt, out.png (samples) and out.jsonl (log).
Settings and presets are in config.py. To fork it, see docs/fork.md.

$ python train.py                                           # 8 x 8 digits, a minute or two
$ python train.py --dataset cifar10 --out cifar10.pt        # by its preset for a CPU or for a GPU
$ python train.py --dataset folder:flowers --steps 3000 --out flowers.pt     # flags override it
$ torchrun --standalone --nproc_per_node=8 train.py --dataset cifar10 --out cifar10.pt
"""

import json
import os
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

import config
import data
import drift
import features
import fid
import mae
import model

N_EVAL = 1000  # samples that are scored


def setup(device):
    """-> rank, world and the device of this process, by the variables that torchrun sets."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        dist.init_process_group(timeout=timedelta(hours=12))  # the first rank may read for long
    device = model.usable(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_flush_denormal(True)  # exp() of far pairs gives denormals, slow on some CPUs
    return rank, world, device


def share(t):
    """This rank's part of a tensor [n, ...] that was drawn for all ranks."""
    return t.chunk(dist.get_world_size())[dist.get_rank()].clone() if dist.is_initialized() else t


# A generator is a model.Generator, which has draw(), generate() and matrices() already, with
#   net(*net.draw(n, g), label, alpha) -> images [n, C, H, W], of labels [n], guidance alpha [n];
#   net.config, a dataclass with in_channels, input_size, num_classes: model.build() takes its
#   fields and makes the net again. Its parameters are averaged and sampled, its buffers are not.
def build_net(args, typed, shape, names, source):
    """A generator of images (C, H, W) in these classes; source: that of --resume or --init."""
    torch.manual_seed(args.seed)
    shape = dict(in_channels=shape[0], input_size=shape[-1], num_classes=len(names))
    settings = dict(model.SIZES[args.model], patch_size=args.patch, noise_image=args.noise_image)
    if source and not typed.keys() & {"model", "patch"}:
        settings = source["config"]
    net = model.build(settings | shape)
    if source:
        weights = source["model" if args.resume else "ema"]
        if not args.resume:  # classes of --init keep their rows; others begin at the mean
            table, known = weights["label_embed.weight"], source["classes"]
            rows = [table[known.index(n)] if n in known else table.mean(0) for n in names]
            weights["label_embed.weight"] = torch.stack(rows)
        with data.one_line(f"{args.resume or args.init} does not fit", "see --patch and --size"):
            net.load_state_dict(weights)
    return net


def build_optimizers(net, args):
    """AdamW; and Muon for the matrices that the generator names, if --muon says so."""
    matrices = net.matrices() if args.muon else []
    rest = [p for p in net.parameters() if all(p is not m for m in matrices)]
    adamw = torch.optim.AdamW(rest, args.lr, (0.9, 0.95), fused=True)
    return [adamw, torch.optim.Muon(matrices, args.muon)] if matrices else [adamw]


def prepare(args, typed, source):
    """Data, generator and encoder -> args of this data, net, sampler, encode, names, device."""
    rank, world, device = setup(args.device)
    data.check_writable(Path(args.out))
    if rank > 0:  # the first rank downloads, reads and trains an encoder for all
        try:
            dist.barrier()
        except RuntimeError:  # it has stopped, and says why
            sys.exit(1)
    images, labels, names = data.load(args.dataset, args.data_dir, args.size)
    if args.unconditional:
        labels, names = torch.zeros_like(labels), ["all"]
    auto = "auto" in args.encoder
    args = config.adapt(args, typed, images.shape[-3:], len(names), world)
    net = build_net(args, typed, images.shape[-3:], names, source).to(device)
    sampler = data.Sampler(images, labels, device, args.flip)
    if rank == 0:
        print(f"{len(labels):,} images; classes {', '.join(names)}; {world} x {device}")
        print("drift in", *args.encoder, f"({config.ABOUT_AUTO})" if auto else "")
    if "mae" in args.encoder:
        path = mae.of_data(sampler, len(names), args.data_dir)
        args.encoder = [path if name == "mae" else name for name in args.encoder]
    encode = features.Encoder(args.encoder, *images.shape[-3:-1], device)
    if rank == 0 and world > 1:
        dist.barrier()
    return args, net, sampler, encode, names, device


def step_loss(net, encode, field, sampler, args, g):
    """The loss of a step, Algorithm 1, and its stats, see drift.features_loss().
    The ranks have equal generators g: each draws the numbers of all, and takes its share."""
    label = sampler.draw_labels(args.labels, g)  # [L]
    alpha = drift.draw_alpha(args.labels, args.alpha_max, args.alpha_k, args.alpha_one, g)  # [L]
    index, view = sampler.draw(label, args.n_pos, args.n_unc, g)  # [L, P + U]
    noises = net.draw(args.labels * args.n_gen, g)  # noise and style, [L * N, ...]
    label, alpha, index, view, *noises = map(share, (label, alpha, index, view, *noises))

    pos, unc = sampler.fetch(index, view).split([args.n_pos, args.n_unc], dim=1)
    real = torch.cat([pos.flatten(0, 1), unc.flatten(0, 1)])  # one batch, as unc may be empty
    with torch.no_grad():
        feats = features.in_parts(encode, args.micro_batch, real)  # {name: [L (P + U), l, C]}
    n = len(label) * args.n_pos
    fp, fu = {k: f[:n] for k, f in feats.items()}, {k: f[n:] for k, f in feats.items()}

    def generate_and_encode(*inputs):
        return encode(net(*inputs).to(real.dtype))

    each = [t.repeat_interleave(args.n_gen) for t in (label, alpha)]  # [L * N]
    with torch.autocast(real.device.type, torch.bfloat16, enabled=real.is_cuda):
        fx = features.in_parts(generate_and_encode, args.micro_batch, *noises, *each)
    return drift.features_loss(fx, fp, fu, alpha, args.taus, args.iters, args.floor, field)


def rate(step, args):
    """Share of the full rates: linear warm-up, constant, linear decay to zero; step from 0."""
    warmup = (step + 1) / max(args.warmup, 1)
    decay = (args.steps - step) / (args.decay * args.steps) if args.decay else 1
    return min(1, warmup, decay)


def update(net, ema, optimizers, loss, args, step):
    """One step of the weights and of their average -> norm of the gradient, before clipping."""
    loss.backward()
    params = [p for p in net.parameters() if p.grad is not None]
    for p in params:
        p.grad = drift.mean_over_ranks(p.grad)
    norm = nn.utils.clip_grad_norm_(params, 2.0)
    for optimizer, full in zip(optimizers, (args.lr, args.muon), strict=False):
        optimizer.param_groups[0].update(lr=full * rate(step, args), weight_decay=args.wd)
        optimizer.step()
        optimizer.zero_grad()
    decay = min(args.ema, (1 + step) / (10 + step))  # the first weights are soon forgotten
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
    return norm


def save(net, ema, optimizers, args, names, step):
    """A checkpoint for sample.py and --resume, renamed when complete."""
    state = dict(model=net.state_dict(), ema=ema.state_dict(), step=step, args=asdict(args))
    state |= dict(config=asdict(net.config), classes=names)
    state |= dict(optimizers=[optimizer.state_dict() for optimizer in optimizers])
    try:
        torch.save(state, f"{args.out}.tmp")
    except (OSError, RuntimeError) as error:  # of a full disk: either
        sys.exit(f"cannot save step {step} ({error}): {args.out} is as it was")
    os.replace(f"{args.out}.tmp", args.out)


def start_log(args, net, sampler):
    """Logs the settings and what real images score; -> up to 10,000 of them, and their labels."""
    if not args.resume:
        if Path(args.out).exists():
            print(f"{args.out} of an earlier run is overwritten, with its log and picture")
        Path(args.out).with_suffix(".jsonl").unlink(missing_ok=True)
    log(args.out, asdict(args))
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    samples, images = args.labels * args.n_gen, args.labels * (args.n_pos + args.n_unc)
    print(f"{millions:.1f}M parameters; a step: {samples:,} samples, {images:,} real images")
    real, labels = sampler.some(10000)
    n = min(N_EVAL, len(real) // 2)
    if n > 10:
        found = fid.scores(real[:n], labels[:n], real[n:], labels[n:])
        log(args.out, {f"real_{name}": value for name, value in found.items()})
    return real, labels


def evaluate(ema, real, labels, out):
    """Scores samples, with the labels of the first n real images, against the others. A picture."""
    n, classes = min(N_EVAL, len(real) // 2), ema.config.num_classes
    label = torch.cat([torch.arange(100, device=real.device) % classes, labels[:n]])
    g = torch.Generator().manual_seed(0)
    x = torch.cat([ema.generate(part, 1.0, g) for part in label.split(250)])
    x = x.clamp(real.min(), real.max())
    if x.shape[1] in (1, 3):
        n_shown = 100 - 100 % min(classes, 10)  # whole rows
        data.save_grid(data.to_uint8(x[:n_shown]), Path(out).with_suffix(".png"), classes)
    if n <= 10:
        return {}
    found = fid.scores(x[100:], label[100:], real[n:], labels[n:])
    return found | dict(copies=fid.copies(x[100:], real))


def log(out, numbers):
    """A line on the screen, and as JSON in the file that is named after the checkpoint."""
    short = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in numbers.items()}
    print("  ".join(f"{k} {v}" for k, v in short.items()), flush=True)
    with Path(out).with_suffix(".jsonl").open("a") as file:
        numbers = {k: None if v != v else v for k, v in numbers.items()}  # NaN is no JSON
        file.write(json.dumps(numbers) + "\n")


@contextmanager
def stop_signals():
    """A list that is no longer empty when a signal has asked the run to end after its step."""
    stop = []
    with ExitStack() as at_exit:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, signal.SIGINT)  # Windows has no SIGHUP and SIGUSR1
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                before = signal.signal(number, lambda *_: stop.append(True))
                at_exit.callback(signal.signal, number, before)
        yield stop


def main(argv=None):
    try:
        args, typed, source = config.parse(argv, __doc__)
        args, net, sampler, encode, names, device = prepare(args, typed, source)
    except (ValueError, OSError, ImportError, KeyboardInterrupt) as error:  # by what was given
        reason = " ".join(str(error).split()) or "stopped before the first step"
        sys.exit(f"train.py: error: {reason}")
    ema, optimizers = deepcopy(net).eval().requires_grad_(False), build_optimizers(net, args)
    start, end = 0, min(args.steps, args.stop_after or args.steps)
    if args.resume:
        start = source["step"]
        ema.load_state_dict(source["ema"])
        if len(source.get("optimizers", [])) == len(optimizers):  # else --muon is new
            for optimizer, state in zip(optimizers, source["optimizers"], strict=True):
                optimizer.load_state_dict(state)
    rank, batch = int(os.environ.get("RANK", 0)), args.labels * args.n_gen
    if rank == 0:
        real, real_labels = start_log(args, net, sampler)
    stat_names = [*(f"drift_{tau:g}" for tau in args.taus), "scale"]
    field = drift.field
    if args.compile or (args.compile is None and device.type == "cuda"):
        try:  # what follows is compiled at its first call
            torch.compile(torch.exp)(torch.ones(1, device=device))
            net.compile(dynamic=False)
            encode.compile(dynamic=False)
            field = torch.compile(field, dynamic=True)
        except Exception as error:  # of a missing compiler or Triton
            print(f"not compiled, so that a step takes longer: {str(error)[:80]!r}")
    began, since, then = time.time(), start, time.time()
    with stop_signals() as stop:
        for step in range(start, end):
            g = torch.Generator(device).manual_seed((10_000_019 * args.seed + step) % 2**63)
            loss, stats = step_loss(net, encode, field, sampler, args, g)
            norm = update(net, ema, optimizers, loss, args, step)
            done = step + 1
            asked = drift.mean_over_ranks(torch.tensor(len(stop)))  # on the CPU: waits for no GPU
            last = done == end or asked > 0
            scored = last or done % args.eval_every == 0
            if not scored and done % args.log_every and done - start not in (1, 10):
                continue
            if not nn.utils.get_total_norm(ema.parameters()).isfinite():
                sys.exit(f"step {done}, not saved: weights are not finite, try a lower --lr")
            if rank == 0:
                seconds = (time.time() - then) / (done - since)
                speed = dict(images_per_s=int(batch / seconds))
                speed |= dict(minutes_left=round((end - done) * seconds / 60, 1))
                seen = dict(step=done, images=done * batch, seconds=int(time.time() - began))
                means = torch.stack(list(stats.values())).mean(0).tolist()  # over features
                numbers = dict(zip(stat_names, means, strict=True), loss=loss.item())
                numbers |= dict(grad_norm=norm.item(), lr=args.lr * rate(step, args))
                log(args.out, seen | numbers | speed)
            if rank == 0 and scored:
                save(net, ema, optimizers, args, names, done)
                log(args.out, seen | evaluate(ema, real, real_labels, args.out))
            since, then = done, time.time()
            if last:
                break
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
