"""
Draws images from a checkpoint of train.py: one forward pass each, by the generator alone.

$ python sample.py --ckpt out.pt --n 64 --cfg 1.5 --seed 0                      # grid.png
$ python sample.py --ckpt out.pt --n 100 --classes 3 5 --out threes_and_fives/  # PNG files
$ python sample.py --ckpt out.pt --n 50000 --out samples.npz                    # arr_0, labels

Are they copies? Below each row the training images nearest in pixels, and real ones at random
$ python sample.py --ckpt out.pt --n 48 --nearest cifar10

What to upload, for others to name as hf://USER/NAME
$ python sample.py --ckpt out.pt --export my_flowers/
$ python sample.py --ckpt hf://USER/NAME

The authors' ImageNet generators; one of latents needs an autoencoder, or gives an .npz of latents
$ python sample.py --ckpt hf://pixel_B_sota --classes 207 360 --n 8
$ python sample.py --ckpt hf://latent_L_sota --classes 207 --n 8 --vae stabilityai/sd-vae-ft-mse
$ python sample.py --ckpt hf://latent_L_sota --n 1000 --out latents.npz
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

import data
import hub
import latents
from model import DiT


def parse(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument(
        "--ckpt", required=True, help="FILE.pt of train.py, hf://USER/NAME, hf://NAME or a folder"
    )
    p.add_argument("--n", type=data.positive_int, default=64, help="number of images")
    p.add_argument(
        "--classes", type=int, nargs="+", help="class numbers, taken in turn; else all of them"
    )
    p.add_argument(
        "--cfg", type=data.number(float, -1e4, 1e4), default=1.0, help="guidance; 1: the data's own"
    )
    p.add_argument(
        "--seed", type=data.seed, default=0, help="image i is the same for any --n and --batch"
    )
    p.add_argument("--out", default="grid.png", help="grid.png, folder/ or samples.npz")
    p.add_argument(
        "--nearest", help="data set: its images nearest to each, and real ones at random"
    )
    p.add_argument(
        "--export", help="folder for the weights in safetensors, a model card and a grid"
    )
    p.add_argument("--data_dir", default="data", help="where data sets are, or are downloaded to")
    p.add_argument(
        "--vae", help="autoencoder of a generator of latents: name or folder for diffusers"
    )
    p.add_argument(
        "--batch", type=data.number(int, 1, 10**6), default=256, help="images in a forward pass"
    )
    p.add_argument("--device", type=data.device, default=data.default_device())
    args = p.parse_args(argv)
    args.kind = "" if args.out.endswith("/") else Path(args.out).suffix  # "": a folder
    if args.kind not in ("", ".png", ".npz"):
        p.error(f"--out {args.out}: name a .png for a grid, a .npz, or a folder with / at its end")
    return args


def save_nearest(images, labels, real, real_labels, generator, path):
    """A grid: below each row of images the nearest real ones in pixels, and random ones."""
    flat = data.to_float(real).flatten(1)
    parts = data.to_float(images).flatten(1).split(100)
    near = torch.cat([torch.cdist(part, flat).argmin(1) for part in parts])
    same_class = (real_labels == labels[:, None]).float()
    random = same_class.multinomial(1, generator=generator)[:, 0]
    columns = min(16, len(images))
    black = real.new_zeros(-len(images) % columns, *real.shape[1:])
    kinds = [torch.cat([x, black]).split(columns) for x in (images, real[near], real[random])]
    rows = [row for rows in zip(*kinds, strict=True) for row in rows]
    data.save_grid(torch.cat(rows), path, columns)


@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    if args.export:
        hub.export(args.ckpt, args.export)
        print(f"{args.export}: to upload as it is, such as by hf upload USER/NAME {args.export}")
        return
    out, kind = Path(args.out), args.kind
    model, trained = DiT.load(args.ckpt)
    model.eval().to(args.device)
    channels, classes = model.config.in_channels, model.config.num_classes
    latent = channels not in (1, 3)
    if latent and not args.vae and kind != ".npz":
        how = "--vae stabilityai/sd-vae-ft-mse decodes the authors', --out FILE.npz keeps them"
        raise ValueError(f"this generator gives latents of {channels} channels: {how}")
    floats = (latent or trained.get("floats", False)) and not args.vae
    floats = floats and kind == ".npz"  # a picture has 8 bits
    if args.nearest:
        if latent or args.vae or kind != ".png":
            raise ValueError("--nearest is for a grid, --out grid.png, of a generator of pixels")
        real, real_labels, _ = data.load(args.nearest, args.data_dir, model.config.input_size)
        real = data.to_uint8(real[:, 0] if real.ndim == 5 else real)  # the first view is the image
        if classes == 1:
            real_labels = torch.zeros_like(real_labels)
        if real.shape[1] != channels or real_labels.max() >= classes:
            raise ValueError(
                f"the generator has not seen {args.nearest}: other channels or classes"
            )
    vae = latents.load_vae(args.vae, args.device, channels) if args.vae else None
    wanted = torch.tensor(args.classes or range(classes))
    if not 0 <= wanted.min() <= wanted.max() < classes:
        raise ValueError(f"--classes are numbers from 0 to {classes - 1} for this checkpoint")
    if kind == "" and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: old images would be counted among the new ones")
    (out if kind == "" else out.parent).mkdir(parents=True, exist_ok=True)
    most = trained.get("alpha_max", math.inf)
    if not 1 <= args.cfg <= most and trained:
        print(f"note: trained for --cfg from 1 to {most}, not for {args.cfg}")

    labels = wanted.repeat(math.ceil(args.n / len(wanted)))[: args.n]
    generator = torch.Generator().manual_seed(args.seed)  # on the CPU: the same on any device
    images = []
    began, done = time.time(), 0
    with data.progress("images", args.n, "") as update:
        for part in labels.split(args.batch):
            batch = model.generate(part.to(args.device), args.cfg, generator)
            if vae:
                batch = latents.decode(vae, batch)
            batch = batch.cpu() if floats else data.to_uint8(batch).cpu()
            if kind == "":
                for i, image in enumerate(batch):
                    data.save_image(image, out / f"{done + i:06d}_class{part[i]}.png")
            else:
                images.append(batch)
            done += len(batch)
            update(len(batch))
    seconds = time.time() - began
    if kind == ".npz":
        images = torch.cat(images)
        if not floats:
            images = images.permute(0, 2, 3, 1)  # as evaluators expect it
        with data.whole(out) as file:
            np.savez(file, arr_0=images.numpy(), labels=labels.numpy())
    elif args.nearest:
        save_nearest(torch.cat(images), labels, real, real_labels, generator, out)
    elif kind == ".png":
        data.save_grid(torch.cat(images), out, columns=math.ceil(args.n**0.5))
    print(f"{args.n:,} images in {seconds:.2f} s, {args.n / seconds:,.0f} images/s: {out}")


if __name__ == "__main__":
    data.run(main)
