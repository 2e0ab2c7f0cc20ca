"""
Times what matters: the drift alone, how it scales, a training step piece by piece, sampling. Nothing else should run.

$ python bench.py                                       # all of it, at the size of train.py's CIFAR-10 preset
$ python bench.py drift scaling --json bench.json       # the drift only, numbers also as JSON
$ python bench.py step --encoder mae_cifar10.pt         # the step with an encoder of features.py

Generator and encoder of a serious run; all pieces grow linearly with the labels, and 3 of them fit 24 GB
$ python features.py --dataset cifar10 --width 64 --patch 1 --layers 3 4 6 3 --steps 1 --out big.pt
$ python bench.py step --model S --patch 2 --labels 3 --encoder big.pt
"""
import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode

from drift import drift_loss, features_loss
from features import Encoder
from model import SIZES, DiT, DiTConfig

JAX_MS = {  # (groups, generated, positive, unconditional, channels): the official code, jitted, on 2 CPU cores
    (10, 64, 64, 16, 128): 5.0, (640, 64, 64, 16, 64): 281, (10, 256, 256, 16, 512): 111, (1, 1024, 1024, 0, 3072): 583}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "L4": 121e12}        # dense bf16, FLOP/s


def seconds(f, device, repeat=10):
    """Median time of f(), after one call that is not counted."""
    times = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[repeat // 2]


def extra_memory(f, device):
    """Peak of the memory during f() above what was held before, MB: of the GPU, on Linux the resident size, or nan."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    if sys.platform != "linux":
        return float("nan")
    status = lambda: dict(line.split(":") for line in open("/proc/self/status"))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                                                                     # the peak starts from here
    held = status()["VmRSS"]
    f()
    return (int(status()["VmHWM"].split()[0]) - int(held.split()[0])) / 1024


def drift_step(shape, device):
    """A function that computes drift_loss and its gradient; shape as in JAX_MS."""
    G, N, P, U, C = shape
    x, y_pos, y_unc = (torch.randn(G, n, C, device=device) for n in (N, P, U))
    x.requires_grad_()

    def f():
        x.grad = None
        drift_loss(x, y_pos, y_unc, torch.ones(G, U, device=device))[0].backward()
    return f


def drift_cost(shape, device):
    """-> milliseconds and MB of it. On a CPU the memory is that of a new process, whose heap has no holes yet."""
    f = drift_step(shape, device)
    if device.type == "cuda":
        memory = extra_memory(f, device)
    else:
        command = [sys.executable, __file__, "--device", str(device), "--memory_of", *map(str, shape)]
        memory = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return seconds(f, device) * 1e3, memory


def step_cost(model, encode, optimizer, labels, n_gen, n_pos, n_unc, kernel, count=False):
    """One training step: {piece: seconds}, or with count {piece: FLOP}. The graph is cut between the pieces."""
    device, c = model.pos_embed.device, model.config
    images = lambda n: torch.rand(n, c.in_channels, c.input_size, c.input_size, device=device) * 2 - 1
    real, label = images(labels * (n_pos + n_unc)), torch.arange(labels, device=device).repeat_interleave(n_gen)
    noise, style = model.draw(labels * n_gen, torch.Generator(device))
    alpha = torch.ones(labels, device=device)
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    cost, leaf = {}, lambda t: t.detach().requires_grad_()

    def timed(piece, f):
        with FlopCounterMode(display=False) if count else nullcontext() as counter:
            began = time.perf_counter()
            result = f()
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent = time.perf_counter() - began
        cost[piece] = cost.get(piece, 0) + (counter.get_total_flops() if count else spent)
        return result

    with autocast():
        x = timed("generator", lambda: model(noise, style, label % c.num_classes, alpha.repeat_interleave(n_gen)))
        x_leaf = leaf(x.float())
        fx = timed("encoder", lambda: encode(x_leaf))
        with torch.no_grad():
            fr = timed("encoder", lambda: encode(real))
    fp, fu = {k: f[:labels * n_pos] for k, f in fr.items()}, {k: f[labels * n_pos:] for k, f in fr.items()}
    fx_leaf = {k: leaf(f) for k, f in fx.items()}
    timed("drift", lambda: features_loss(fx_leaf, fp, fu, alpha, **kernel)[0].backward())
    timed("encoder", lambda: torch.autograd.backward(list(fx.values()), [f.grad for f in fx_leaf.values()]))
    timed("generator", lambda: x.backward(x_leaf.grad.to(x.dtype)))
    timed("optimiser", lambda: (torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0), optimizer.step()))
    optimizer.zero_grad()
    return cost


def main():
    p = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="*", help="drift, scaling, step, sampling; all of them if none is named")
    p.add_argument("--encoder", default="pixels", help="as of train.py, but a file for mae")
    p.add_argument("--size", type=int, default=32, help="image size in pixels")
    p.add_argument("--model", default="tiny", choices=SIZES)
    p.add_argument("--patch", type=int, default=4)
    p.add_argument("--channels", type=int, default=3, help="4 for latents")
    p.add_argument("--labels", type=int, default=10)
    p.add_argument("--n_gen", type=int, default=32)
    p.add_argument("--n_pos", type=int, default=32)
    p.add_argument("--n_unc", type=int, default=8)
    p.add_argument("--iters", type=int, default=2)
    p.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    p.add_argument("--json", help="file for the numbers")
    p.add_argument("--memory_of", type=int, nargs=5, help=argparse.SUPPRESS)                          # see drift_cost()
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    what = args.what or ["drift", "scaling", "step", "sampling"]
    if not {"drift", "scaling", "step", "sampling"}.issuperset(what):
        p.error(f"{' '.join(what)}: there are drift, scaling, step and sampling")
    sizes = [getattr(args, k) for k in ("size", "patch", "channels", "labels", "n_gen", "n_pos", "iters", "steps")]
    if not (1 <= min(sizes) and max(sizes) <= 10**6 and 0 <= args.n_unc <= 10**6 and 2 <= args.n_gen):
        p.error("sizes and numbers must be at least 1, --n_gen 2")
    torch.manual_seed(0)
    try:
        device = torch.device(args.device)
        drift_step((2, 8, 8, 2, 4), device)()                                              # libraries load at first use
        if args.memory_of:
            return print(extra_memory(drift_step(args.memory_of, device), device))
        encode = Encoder(args.encoder, args.channels, args.size, device=device)
        model = DiT(DiTConfig.named(args.model, input_size=args.size, patch_size=args.patch,
                                    in_channels=args.channels)).to(device)
    except (ValueError, RuntimeError, AssertionError) as error:
        p.error(str(error))
    for q in model.parameters():
        torch.nn.init.normal_(q, std=0.02)                 # as it starts, the generator gives zeros
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}")
    result = {"torch": torch.__version__, "device": name}

    if "drift" in what:
        print("\ndrift_loss, forward and gradient: groups, generated, positive, unconditional, channels\n"
              f"{'shape':>28s} {'ms':>9s} {'JAX, 2 cores':>13s} {'ratio':>6s} {'extra MB':>9s}")
        for shape, jax in JAX_MS.items():
            ms, memory = drift_cost(shape, device)
            result.setdefault("drift", []).append(dict(shape=shape, ms=ms, jax_ms=jax, extra_mb=memory))
            print(f"{str(shape):>28s} {ms:9.2f} {jax:13.1f} {ms / jax:6.2f} {memory:9.1f}", flush=True)
    if "scaling" in what:
        print("\nscaling, 128 channels, as many positives as generated\n"
              f"{'groups':>8s} {'N':>6s} {'ms':>9s} {'extra MB':>9s}")
        for G, N in [(1, 64 * 4**i) for i in range(4)] + [(4**i, 64) for i in range(1, 6)]:
            ms, memory = drift_cost((G, N, N, 0, 128), device)
            result.setdefault("scaling", []).append(dict(groups=G, N=N, ms=ms, extra_mb=memory))
            print(f"{G:8d} {N:6d} {ms:9.2f} {memory:9.1f}", flush=True)
    if "step" in what:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        step = lambda **more: step_cost(model, encode, optimizer, args.labels, args.n_gen, args.n_pos, args.n_unc,
                                        dict(iters=args.iters), **more)
        flop, memory = step(count=True), extra_memory(step, device)
        runs = [step() for _ in range(args.steps)]
        whole = sum(sum(run.values()) for run in runs) / len(runs)
        print(f"\n{args.model}/{args.patch}, {args.encoder}, {args.labels} x ({args.n_gen} generated, {args.n_pos} "
              f"positive, {args.n_unc} unconditional), {device}: {whole:.2f} s a step, {memory:,.0f} MB")
        result["step"] = dict(vars(args), seconds=whole, extra_mb=memory, pieces={})
        for piece in runs[0]:
            spent = sum(run[piece] for run in runs) / len(runs)
            result["step"]["pieces"][piece] = dict(seconds=spent, flop=flop[piece])
            print(f"{piece:10s} {spent:8.3f} s  {spent / whole:6.1%} {flop[piece] / 1e9:10,.1f} GFLOP "
                  f"{flop[piece] / spent / 1e9:9,.0f} GFLOP/s")
        peak = next((value for key, value in PEAK.items() if key in name), None)
        if peak:
            utilisation = result["step"]["utilisation"] = flop["generator"] / whole / peak
            print(f"model FLOP utilisation: {utilisation:.1%}, FLOP of the generator in the whole step's time")
    if "sampling" in what:
        n = 256 if device.type == "cuda" else 16
        label = torch.zeros(n, dtype=torch.long, device=device)
        once = seconds(lambda: model.generate(label, 1.0, torch.Generator()), device, 5)
        many = seconds(lambda: [model.generate(label, 1.0, torch.Generator()) for _ in range(50)], device, 1)
        result["sampling"] = dict(batch=n, images_per_s=n / once, images_per_s_50_calls=n / many)
        print(f"\nsampling, {n} at a time: {n / once:,.1f} images/s; the same network called 50 times, as by a "
              f"diffusion sampler: {n / many:,.1f} images/s")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
