"""Images from a checkpoint, one forward pass each. Latents are decoded by an autoencoder of
diffusers, or kept as floats in an .npz.

$ python sample.py --ckpt out.pt --n 64 --out grid.png                 # a grid, a class a column
$ python sample.py --ckpt out.pt --n 100 --classes 3 5 --out samples/  # files; names or numbers
$ python sample.py --ckpt out.pt --n 50000 --out samples.npz           # an array for evaluators
$ python sample.py --ckpt latent_L.pt --classes 207 --n 8 --vae stabilityai/sd-vae-ft-mse
"""

import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import model


def options(argv):
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", required=True, help="of train.py, or of imagenet/convert.py")
    p.add_argument("--n", type=int, default=64, help="number of images")
    p.add_argument("--classes", nargs="+", help="names or numbers, in turn [all]")
    p.add_argument("--cfg", type=float, default=1.0, help="guidance alpha; 1: the data's own [1]")
    p.add_argument("--seed", type=int, default=0, help="image i is the same for any --n, --batch")
    p.add_argument("--out", default="grid.png", help="grid.png, samples.npz or a folder/")
    p.add_argument("--vae", help="autoencoder of a generator of latents, for diffusers")
    p.add_argument("--batch", type=int, default=250, help="images in a forward pass")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p.parse_args(argv)


@torch.no_grad()
def main(argv=None):
    args = options(argv)
    out = Path(args.out)
    kind = "" if args.out.endswith("/") else out.suffix.lower()
    try:
        device = model.usable(args.device)
        net, checkpoint = model.load(args.ckpt)
        names = checkpoint["classes"]
        numbers = {str(i): i for i in range(len(names))}
        numbers |= {name: i for i, name in enumerate(names)}  # a class may have a number for a name
        wanted = args.classes or names
        unknown = [name for name in wanted if name not in numbers]
        if unknown:
            raise ValueError(f"no class {unknown[0]}: there are {', '.join(names)}")
        if args.cfg != 1 and checkpoint["args"].get("alpha_max") == 1:
            print("--cfg changes nothing: this generator was trained without guidance")
        if kind not in (".png", ".npz", ""):
            raise ValueError(f"--out {out}: name a .png, a .npz or a folder/")
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(f"--out {out} is not empty")
        latents = net.config.in_channels not in (1, 3) and not args.vae
        if latents and kind != ".npz":
            raise ValueError("this generator gives latents: name a --vae, or an --out FILE.npz")
        (out.parent if kind else out).mkdir(parents=True, exist_ok=True)
        if args.vae:
            from diffusers import AutoencoderKL

            vae = AutoencoderKL.from_pretrained(args.vae, low_cpu_mem_usage=False).to(device)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"sample.py: error: {error}")
    net.eval().to(device)
    label = torch.tensor([numbers[wanted[i % len(wanted)]] for i in range(args.n)])
    generator = torch.Generator().manual_seed(args.seed)  # on the CPU: the same on any device
    images, began = [], time.time()
    for first in range(0, args.n, args.batch):
        x = net.generate(label[first : first + args.batch].to(device), args.cfg, generator)
        if args.vae:
            x = x / vae.config.scaling_factor + (vae.config.shift_factor or 0)
            x = torch.cat([vae.decode(few).sample for few in x.split(8)])  # it takes much memory
        x = (x if latents else data.to_uint8(x)).cpu()
        if kind:
            images.append(x)
            continue
        for i, image in enumerate(x.permute(0, 2, 3, 1).squeeze(3).numpy(), first):
            Image.fromarray(image).save(out / f"{i:06d}_{names[label[i]]}.png")
    if kind == ".png":
        data.save_grid(torch.cat(images), out, len(wanted))
    elif kind == ".npz":
        array = torch.cat(images) if latents else torch.cat(images).permute(0, 2, 3, 1)
        if all(name.isdigit() for name in names):  # then a label is the number it was trained on
            label = torch.tensor([int(names[i]) for i in label])
        np.savez(out, arr_0=array.numpy(), labels=label.numpy())
    print(f"{args.n:,} images in {time.time() - began:.2f} s: {out}")


if __name__ == "__main__":
    main()
