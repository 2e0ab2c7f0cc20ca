"""
Times what matters: the drift, how it scales, a step piece by piece, sampling. Run nothing else.

$ python bench.py                                     # the drift, eager and compiled
$ python bench.py step --labels 1                     # a tenth of a step of the CIFAR-10 preset
$ python bench.py step --model tiny --size 16 --labels 5 --n_gen 32 --n_pos 32  # of cifar10-16
$ python bench.py drift scaling step sampling --json bench.json

A step uses an untrained ResNet-MAE of the default size: weights change no time.
"""

import argparse
import json
import time
from contextlib import nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import drift
from features import Encoder
from mae import MAE
from model import SIZES, DiT, DiTConfig

SHAPES = [  # groups, generated, positive, unconditional, channels
    (10, 64, 64, 16, 128),
    (640, 64, 64, 16, 64),
    (10, 256, 256, 16, 512),
    (1, 1024, 1024, 0, 3072),
]
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "L4": 121e12}  # bf16 FLOP/s


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(f, device, repeat=10):
    """Median time of f(), after one call that is not counted."""
    times = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        f()
        wait(device)
        times.append(1e3 * (time.perf_counter() - began))
    return sorted(times[1:])[repeat // 2]


class DriftCost:
    """drift_loss() of one shape with its gradient, and its matrix products alone."""

    def __init__(self, shape, device):
        G, N, P, U, C = shape
        self.x, y_pos, y_unc = (torch.randn(G, n, C, device=device) for n in (N, P, U))
        self.targets = y_pos, y_unc, torch.ones(G, U, device=device)
        self.y = torch.cat([self.x, y_unc, y_pos], dim=1)
        self.W = torch.randn(G, len(drift.TAUS) * N, N + U + P, device=device)
        self.device = device

    def loss(self):
        x = self.x.detach().requires_grad_()
        drift.drift_loss(x, *self.targets)[0].backward()

    def products(self):
        """Distances, and the field of every tau."""
        with drift.exact_float32(self.device.type):
            self.x @ self.y.mT
            self.W @ self.y


def bench_drift(args):
    print("\ndrift_loss, forward and gradient, against the time of its matrix products alone")
    print(
        f"{'groups, gen, pos, unc, channels':>32s} {'products':>9s} {'eager':>8s} {'compiled':>9s}"
    )
    eager, rows = drift.field_weights, []
    for shape in SHAPES:
        cost = DriftCost(shape, args.device)
        products = milliseconds(cost.products, args.device)
        plain = milliseconds(cost.loss, args.device)
        drift.field_weights = torch.compile(eager)
        compiled = milliseconds(cost.loss, args.device)
        drift.field_weights = eager
        rows.append(dict(shape=shape, products_ms=products, eager_ms=plain, compiled_ms=compiled))
        ratios = f"{plain / products:7.1f}x {compiled / products:8.1f}x"
        print(f"{shape!s:>32s} {products:6.1f} ms {ratios}", flush=True)
    return rows


def bench_scaling(args):
    print("\nscaling, 128 channels, as many positives as generated, no others")
    rows = []
    sizes = (1, 64), (1, 256), (1, 1024), (1, 4096), (64, 64), (256, 64), (1024, 64)
    for G, N in sizes:
        ms = milliseconds(DriftCost((G, N, N, 0, 128), args.device).loss, args.device)
        rows.append(dict(groups=G, N=N, ms=ms))
        print(f"{G:6d} groups of {N:5d}: {ms:9.2f} ms", flush=True)
    return rows


class StepCost:
    """One training step, its graph cut between the pieces; seconds, or FLOP, of each of them."""

    def __init__(self, args):
        size, device = args.size, args.device
        config = DiTConfig.named(args.model, input_size=size, patch_size=args.patch)
        self.args, self.device = args, device
        self.model = DiT(config).to(device)
        for p in self.model.parameters():
            torch.nn.init.normal_(p, std=0.02)  # as it starts, the generator gives zeros
        self.encode = Encoder("pixels", 3, size, pools=[2, 4])
        net = MAE(3, size, patch=max(1, size // 16), layers=(2, 2, 2, 2))
        self.encode.names, self.encode.nets = ["mae"], torch.nn.ModuleList([net])
        self.encode.requires_grad_(False).eval().to(device)
        if device.type == "cuda":  # as Encoder keeps its networks there
            net.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        if args.compile:
            self.model = torch.compile(self.model, dynamic=False)
            self.encode = torch.compile(self.encode, dynamic=False)
            drift.field_weights = torch.compile(drift.field_weights, dynamic=True)

    def piece(self, name, f, *args):
        """f(*args), whose cost is added to that of a name."""
        with FlopCounterMode(display=False) if self.count else nullcontext() as counter:
            began = time.perf_counter()
            result = f(*args)
            wait(self.device)
            spent = time.perf_counter() - began
        self.cost[name] = self.cost.get(name, 0) + (counter.get_total_flops() if counter else spent)
        return result

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, fx, fr, alpha, n):
        fp, fu = {k: f[:n] for k, f in fr.items()}, {k: f[n:] for k, f in fr.items()}
        return drift.features_loss(fx, fp, fu, alpha, iters=2)[0]

    def __call__(self, count=False):
        self.count, self.cost, args = count, {}, self.args
        n = args.labels * args.n_gen
        real = args.labels * (args.n_pos + args.n_unc)
        real = torch.rand(real, 3, args.size, args.size, device=self.device) * 2 - 1
        alpha = torch.ones(args.labels, device=self.device)
        label = torch.arange(n, device=self.device) % 10
        noise = self.model.draw(n, torch.Generator(self.device))
        inputs = *noise, label, torch.ones(n, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            x = self.piece("generator", self.model, *inputs)
        images = x.detach().float().requires_grad_()
        fx = self.piece("encoder", self.encode, images)
        with torch.no_grad():
            fr = self.piece("encoder", self.encode, real)
        leaves = {name: f.detach().requires_grad_() for name, f in fx.items()}
        loss = self.piece("drift", self.loss, leaves, fr, alpha, args.labels * args.n_pos)
        self.piece("drift", loss.backward)
        grads = [f.grad for f in leaves.values()]
        self.piece("encoder", torch.autograd.backward, list(fx.values()), grads)
        self.piece("generator", x.backward, images.grad.to(x.dtype))
        self.piece("optimiser", self.update)
        return self.cost


def bench_step(args):
    step = StepCost(args)
    flop = step(count=True) if not args.compile else {}
    step()
    runs = [step() for _ in range(args.steps)]
    mean = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
    whole = sum(mean.values())
    print(
        f"\n{args.model}/{args.patch} at {args.size}, {args.labels} x ({args.n_gen} generated, "
        f"{args.n_pos} positive, {args.n_unc} unconditional): {whole:.3f} s a step"
    )
    for name, seconds in mean.items():
        rate = f"{flop[name] / seconds / 1e9:9,.0f} GFLOP/s" if flop else ""
        print(f"{name:10s} {seconds:8.3f} s  {seconds / whole:6.1%} {rate}")
    peaks = [peak for name, peak in PEAK.items() if name in args.name]
    if peaks and flop:
        mfu = flop["generator"] / whole / peaks[0]
        print(f"model FLOP utilisation: {mfu:.1%}, FLOP of the generator in the whole step's time")
    return dict(seconds=whole, pieces=mean, flop=flop)


def bench_sampling(args):
    config = DiTConfig.named(args.model, input_size=args.size, patch_size=args.patch)
    model = DiT(config).to(args.device)
    n = 256 if args.device.type == "cuda" else 16
    label = torch.zeros(n, dtype=torch.long, device=args.device)
    once = milliseconds(lambda: model.generate(label, 1.0, torch.Generator()), args.device)
    print(f"\nsampling, {n} at a time: {1e3 * n / once:,.0f} images/s, in one pass each")
    return dict(batch=n, images_per_s=1e3 * n / once)


BENCHES = dict(drift=bench_drift, scaling=bench_scaling, step=bench_step, sampling=bench_sampling)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    positive_int = data.number(int, 1, 10**6)
    p.add_argument("what", nargs="*", default=["drift"], help=", ".join(BENCHES))
    p.add_argument(
        "--model", default="S", choices=SIZES, help="as all that follows: of the CIFAR-10 preset"
    )
    p.add_argument("--size", type=positive_int, default=32, help="image size in pixels")
    p.add_argument("--patch", type=positive_int, default=2)
    p.add_argument("--labels", type=positive_int, default=10)
    p.add_argument("--n_gen", type=data.number(int, 2, 10**6), default=64)
    p.add_argument("--n_pos", type=positive_int, default=64)
    p.add_argument("--n_unc", type=data.number(int, 0, 10**6), default=0)
    p.add_argument(
        "--steps", type=positive_int, default=3, help="timed steps, after one that is not"
    )
    p.add_argument("--compile", action="store_true", help="of the step: model, encoder and drift")
    p.add_argument("--json", help="file for the numbers")
    p.add_argument("--device", type=data.device, default=data.default_device())
    args = p.parse_args()
    if not set(BENCHES).issuperset(args.what):
        p.error(f"{' '.join(args.what)}: there are {', '.join(BENCHES)}")
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    args.name = f"{torch.get_num_threads()} CPU threads"
    if args.device.type == "cuda":
        args.name = torch.cuda.get_device_name(args.device)
    print(f"torch {torch.__version__}, {args.name}")
    results = {name: BENCHES[name](args) for name in args.what}
    if args.json:
        with data.whole(args.json) as file:
            file.write(json.dumps(results, indent=1).encode())


if __name__ == "__main__":
    data.run(main)
