"""
Draws images from a checkpoint of train.py: one forward pass each, by the generator alone.

$ python sample.py --ckpt out.pt --n 64 --cfg 1.5 --seed 0                        # grid.png
$ python sample.py --ckpt out.pt --n 100 --classes 3 5 --out threes_and_fives/    # PNG files
$ python sample.py --ckpt out.pt --n 50000 --out samples.npz                      # arr_0 uint8 [n, H, W, C], labels

Are they copies? Below each row of samples the training images nearest in pixels, and a row of real images at random
$ python sample.py --ckpt out.pt --n 48 --nearest cifar10                         # grid.png

The authors' ImageNet generators, downloaded once; a generator of latents needs an autoencoder, or gives an .npz of them
$ python sample.py --ckpt hf://pixel_B_sota --classes 207 360 --n 8
$ python sample.py --ckpt hf://latent_L_sota --classes 207 360 --n 8 --vae stabilityai/sd-vae-ft-mse
$ python sample.py --ckpt hf://latent_L_sota --n 1000 --out latents.npz           # latents float32 [n, C, H, W], labels
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

import data
from model import DiT


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", required=True, help="checkpoint of train.py, whose EMA weights are used; or the "
                   "authors' generator, hf://NAME or a folder")
    p.add_argument("--n", type=int, default=64, help="number of images")
    p.add_argument("--classes", type=int, nargs="+", help="class numbers, taken in turn; all of them if none are named")
    p.add_argument("--cfg", type=float, default=1.0, help="guidance strength alpha; 1: the data's own distribution")
    p.add_argument("--seed", type=int, default=0, help="image i of a seed is the same for any --n and --batch")
    p.add_argument("--out", default="grid.png", help="grid.png, folder/ or samples.npz")
    p.add_argument("--nearest", help="data set: below each row of the grid its nearest images, and real ones at random")
    p.add_argument("--data_dir", default="data", help="where data sets are, or are downloaded to")
    p.add_argument("--vae", help="autoencoder of a generator of latents: a name or folder that diffusers knows")
    p.add_argument("--batch", type=int, default=256, help="images in a forward pass")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    if not (1 <= args.n <= 10**8 and 1 <= args.batch <= 10**6 and -1e4 <= args.cfg <= 1e4 and 0 <= args.seed < 2**63):
        p.error("--n and --batch must be at least 1, --cfg a guidance strength such as 1.5, --seed not negative")
    if Path(args.out).suffix not in ("", ".png", ".npz") and not args.out.endswith("/"):
        p.error(f"--out {args.out}: name a .png for a grid, a .npz, or a folder with / at its end")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError):
        p.error(f"--device {args.device} is not to be had here")
    return p, args


def load_decoder(name, latent_channels, device):
    """A function latents [B, C, h, w] -> images [B, 3, H, W] in about [-1, 1], by an autoencoder of diffusers.

    The division by the scaling factor is the authors': 0.18215 for the SD-VAE, 1 for the tiny autoencoders made for it.
    """
    try:
        from diffusers import AutoModel
        vae = AutoModel.from_pretrained(name, low_cpu_mem_usage=False).to(device).eval()  # True wants accelerate
        if vae.config.latent_channels != latent_channels:
            raise ValueError(f"it decodes {vae.config.latent_channels} channels, the generator gives {latent_channels}")
    except ImportError:
        raise ValueError("--vae needs diffusers: pip install diffusers, or name an .npz for --out, to get the latents"
                         ) from None
    except Exception as error:  # hub, files, configurations: each raises its own
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"--vae {name} cannot decode this generator's latents ({text[:200]})") from None
    decode = lambda z: vae.decode(z / vae.config.scaling_factor).sample
    return lambda latents: torch.cat([decode(z) for z in latents.split(8)])              # 8: a decoder is memory-hungry


@torch.no_grad()
def main(argv=None):
    p, args = parse(argv)
    out, folder = Path(args.out), Path(args.out).suffix not in (".png", ".npz")
    try:
        model, trained = DiT.load(args.ckpt)
        model.eval().to(args.device)
        channels, decode = model.config.in_channels, lambda images: images
        latent = channels not in (1, 3) and not args.vae
        if latent and out.suffix != ".npz":
            raise ValueError(f"this generator gives latents of {channels} channels: --vae stabilityai/sd-vae-ft-mse "
                             "decodes those of the authors, --out latents.npz keeps them as they are")
        if args.nearest:
            if args.vae or latent or out.suffix != ".png":
                raise ValueError("--nearest is for a grid, --out grid.png, of a generator of pixels")
            real, real_labels, _ = data.load(args.nearest, args.data_dir, model.config.input_size)
            if real.shape[1] != channels or real_labels.max() >= model.config.num_classes:
                raise ValueError(f"the generator has not seen {args.nearest}: its channels or classes are others")
        if args.vae:
            decode = load_decoder(args.vae, channels, args.device)
        classes = args.classes or range(model.config.num_classes)
        if not all(0 <= c < model.config.num_classes for c in classes):
            raise ValueError(f"--classes are numbers from 0 to {model.config.num_classes - 1} for this checkpoint")
        if folder and out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty: old images would be counted among the new ones; name another folder")
        (out if folder else out.parent).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        p.error(str(error))
    if trained and not 1 <= args.cfg <= trained["alpha_max"]:
        print(f"note: trained for --cfg from 1 to {trained['alpha_max']}, not for {args.cfg}")

    labels = torch.tensor(classes).repeat(-(-args.n // len(classes)))[:args.n]
    generator = torch.Generator().manual_seed(args.seed)       # on the CPU: the same noise on any device
    images, began, done = [], time.time(), 0
    for part in labels.split(args.batch):
        batch = model.generate(part.to(args.device), args.cfg, generator)
        batch = (batch if latent else data.to_uint8(decode(batch))).cpu()
        if folder:
            for i, image in enumerate(batch):
                data.save_image(image, out / f"{done + i:06d}_class{part[i]}.png")
        else:
            images.append(batch)
        done += len(batch)
        if sys.stderr.isatty():
            print(f"\r{done:,} of {args.n:,}", end="" if done < args.n else "\n", file=sys.stderr, flush=True)
    seconds = time.time() - began
    if out.suffix == ".png" and args.nearest:
        images, columns, flat = torch.cat(images), min(16, args.n), data.to_float(real).flatten(1)
        near = torch.cat([torch.cdist(data.to_float(x).flatten(1), flat).argmin(1) for x in images.split(100)])
        same = (real_labels == labels[:, None]).float().multinomial(1, generator=generator)[:, 0]       # of its class
        black = real.new_zeros(-args.n % columns, *real.shape[1:])
        rows = zip(*(torch.cat([t, black]).split(columns) for t in (images, real[near], real[same])))
        data.save_grid(torch.cat([t for row in rows for t in row]), out, columns)
    elif out.suffix == ".png":
        data.save_grid(torch.cat(images), out, columns=int(np.ceil(args.n**0.5)))
    elif out.suffix == ".npz":
        images = torch.cat(images)
        named = {"latents": images} if latent else {"arr_0": images.permute(0, 2, 3, 1)}
        with data.whole(out) as file:
            np.savez(file, **{k: v.numpy() for k, v in named.items()}, labels=labels.numpy())
    print(f"{args.n:,} images in {seconds:.2f} s, {args.n / seconds:,.0f} images/s: {out}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # the disk is full
        sys.exit(f"sample.py: error: {error}")
