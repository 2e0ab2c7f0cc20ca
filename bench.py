"""
Times a training step at the size of CIFAR-10, piece by piece.

The step of train.py's preset, with an encoder of features.py
$ python bench.py --encoder mae_cifar10.pt

Generator and encoder of a serious run; all pieces grow linearly with the labels, and 3 of them fit 24 GB
$ python features.py --dataset cifar10 --width 64 --patch 1 --layers 3 4 6 3 --steps 1 --out big.pt
$ python bench.py --model S --patch 2 --labels 3 --encoder big.pt
"""
import argparse
import time

import torch

from drift import features_loss
from features import Encoder
from model import SIZES, DiT, DiTConfig


def step_times(model, encode, optimizer, labels, n_gen, n_pos, n_unc, kernel):
    """Seconds of one training step: {piece: seconds}. The graph is cut where one piece hands over to the next."""
    device, c = model.pos_embed.device, model.config
    images = lambda n: torch.rand(n, c.in_channels, c.input_size, c.input_size, device=device) * 2 - 1
    real, label = images(labels * (n_pos + n_unc)), torch.arange(labels, device=device).repeat_interleave(n_gen)
    noise, style = model.draw(labels * n_gen, torch.Generator(device))
    alpha = torch.ones(labels, device=device)
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    seconds, leaf = {}, lambda t: t.detach().requires_grad_()

    def timed(piece, f):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[piece] = seconds.get(piece, 0) + time.perf_counter() - began
        return result

    with autocast():
        x = timed("generator", lambda: model(noise, style, label % c.num_classes, alpha.repeat_interleave(n_gen)))
        x_leaf = leaf(x.float())
        fx = timed("encoder", lambda: encode(x_leaf))
        with torch.no_grad():
            fr = timed("encoder", lambda: encode(real))
    fr = {k: f.split([labels * n_pos, labels * n_unc]) for k, f in fr.items()}
    fp, fu = ({k: f[i] for k, f in fr.items()} for i in (0, 1))
    fx_leaf = {k: leaf(f) for k, f in fx.items()}
    timed("drift", lambda: features_loss(fx_leaf, fp, fu, alpha, **kernel)[0].backward())
    timed("encoder", lambda: torch.autograd.backward(list(fx.values()), [f.grad for f in fx_leaf.values()]))
    timed("generator", lambda: x.backward(x_leaf.grad.to(x.dtype)))
    timed("optimiser", lambda: (torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0), optimizer.step()))
    optimizer.zero_grad()
    return seconds


def main():
    p = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--encoder", default="pixels", help="as of train.py, but a file for mae")
    p.add_argument("--size", type=int, default=32, help="image size in pixels")
    p.add_argument("--model", default="tiny", choices=SIZES)
    p.add_argument("--patch", type=int, default=4)
    p.add_argument("--labels", type=int, default=10)
    p.add_argument("--n_gen", type=int, default=32)
    p.add_argument("--n_pos", type=int, default=32)
    p.add_argument("--n_unc", type=int, default=8)
    p.add_argument("--iters", type=int, default=2)
    p.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    torch.manual_seed(0)
    try:
        encode = Encoder(args.encoder, 3, args.size, device=args.device)
        model = DiT(DiTConfig.named(args.model, input_size=args.size, patch_size=args.patch)).to(args.device)
    except (ValueError, RuntimeError, AssertionError) as error:
        p.error(str(error))
    for q in model.parameters():
        torch.nn.init.normal_(q, std=0.02)                 # as it starts, the generator gives zeros
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    sizes = args.labels, args.n_gen, args.n_pos, args.n_unc
    runs = [step_times(model, encode, optimizer, *sizes, dict(iters=args.iters)) for _ in range(args.steps + 1)][1:]
    whole = sum(sum(run.values()) for run in runs)
    print(f"{args.model}/{args.patch}, {args.encoder}, {args.labels} x ({args.n_gen} generated, {args.n_pos} positive, "
          f"{args.n_unc} unconditional), {args.device}: {whole / len(runs):.2f} s a step")
    for piece in runs[0]:
        seconds = sum(run[piece] for run in runs)
        print(f"{piece:10s} {seconds / len(runs):8.3f} s  {seconds / whole:6.1%}")


if __name__ == "__main__":
    main()
