"""Times the drift loss, and a training step piece by piece; by default both, small.

$ python -m tools.bench drift step --model S --size 32 --labels 10 --n_gen 64 --n_pos 64 --compile
"""

import argparse
from itertools import pairwise

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer, timer  # both wait for the GPU

import drift
from features import Encoder
from model import SIZES, DiT, DiTConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BFLOAT16 = torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")
SHAPES = [(10, 64, 64, 16, 128), (640, 64, 64, 16, 64), (10, 256, 256, 16, 512)]
SHAPES += [(1, 1024, 1024, 0, 3072)]  # groups, generated, positive, unconditional, channels


class Launches(TorchDispatchMode):
    count = 0  # of operations for which a GPU launches a kernel: all but views

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += not op.is_view
        return op(*args, **(kwargs or {}))


def milliseconds(code, **names):
    """Mean time of ten runs, after two that are not counted."""
    timed = Timer(code, globals=names, num_threads=torch.get_num_threads())
    return 1e3 * timed.timeit(10).mean


def bench_drift():
    for G, N, P, U, C in SHAPES:
        x, y_pos, y_unc = (torch.randn(G, n, C, device=DEVICE) for n in (N, P, U))
        y = torch.cat([x, y_unc, y_pos], dim=1)
        W = torch.randn(G, len(drift.TAUS) * N, N + U + P, device=DEVICE)  # for the fields
        names = dict(drift=drift, x=x.requires_grad_(), y=y, y_pos=y_pos, y_unc=y_unc, W=W)
        with Launches() as launches:
            drift.drift_loss(x, y_pos, y_unc)[0].backward()
        products = milliseconds("drift.matmul(x, y.mT); drift.matmul(W, y)", **names)
        whole = milliseconds("drift.drift_loss(x, y_pos, y_unc)[0].backward()", **names)
        print(f"drift_loss {G, N, P, U, C}: {whole:.2f} ms, {whole / products:.1f} x its", end=" ")
        print(f"matrix products, {launches.count} launches without --compile", flush=True)


def bench_step(args):
    config = DiTConfig(**SIZES[args.model], input_size=args.size, patch_size=args.patch)
    model, field = DiT(config).to(DEVICE), drift.field
    if args.compile:
        model.compile(dynamic=False)
        field = torch.compile(field, dynamic=True)
    encode = Encoder(args.encoder, 3, args.size, DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    label = torch.arange(args.labels * args.n_gen, device=DEVICE) % 10
    alpha = torch.ones(len(label), device=DEVICE)
    real = torch.rand(args.labels * args.n_pos, 3, args.size, args.size, device=DEVICE)
    print("seconds of a step: generator, encoder, drift, backward, optimiser; the first warms up")
    for _ in range(4):
        noise, style = model.draw(len(label), torch.Generator(DEVICE))
        times = [timer()]
        with BFLOAT16:
            x = model(noise, style, label, alpha)
        times.append(timer())
        fx, fp = encode(x.float()), encode(real)
        times.append(timer())
        fu = {name: f[:0] for name, f in fp.items()}
        loss, _ = drift.features_loss(fx, fp, fu, alpha[: args.labels], iters=2, field=field)
        times.append(timer())
        loss.backward()
        times.append(timer())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(timer())
        print(*(f"{after - before:.4f}" for before, after in pairwise(times)), flush=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("what", nargs="*", choices=["drift", "step", "all"], default="all")
    p.add_argument("--model", default="tiny", choices=SIZES)
    for name, default in dict(size=16, patch=2, labels=5, n_gen=32, n_pos=32).items():
        p.add_argument(f"--{name}", type=int, default=default, help="as of train.py")
    p.add_argument("--encoder", nargs="+", default=["pixels", "pool:2", "pool:4"])
    p.add_argument("--compile", action="store_true", help="the generator and the drift")
    args = p.parse_args(argv)
    torch.set_flush_denormal(True)  # as train.py does
    both = "all" in args.what
    if both or "drift" in args.what:
        bench_drift()
    if both or "step" in args.what:
        bench_step(args)


if __name__ == "__main__":
    main()
