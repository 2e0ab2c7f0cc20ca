"""Encodes a folder of images by an autoencoder of diffusers, so that a generator trains on latents.

$ python -m imagenet.encode --dataset folder:train --vae stabilityai/sd-vae-ft-mse --out latents
$ python train.py --dataset latents:latents

    latents.npy   float16 [N, 2, C, h, w]: a latent of each image, and one of its mirror image
    labels.npy    int64 [N]
    classes.txt   names of the classes, one a line
    done          how many images are written: a killed run goes on there, by the same command
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data


def centre_crop(image, size):
    """The middle of a pillow image, size x size, as ADM crops ImageNet."""
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read(file, size):
    """Reads an image file -> the image and its mirror image, uint8 [2, 3, size, size]."""
    image = np.array(centre_crop(data.read_image(file), size)).transpose(2, 0, 1)
    return np.stack([image, image[:, :, ::-1]])


def encode_views(vae, views, first):
    """views uint8 [n, 2, 3, H, W] of images first, first + 1, ... -> latents [n, 2, C, h, w]."""
    spread = vae.encode(data.to_float(views.flatten(0, 1).to(vae.device))).latent_dist
    draws = torch.Generator(vae.device).manual_seed(first)  # as if a run had not been killed
    latents = spread.sample(draws) - (vae.config.shift_factor or 0)
    return (latents * vae.config.scaling_factor).unflatten(0, (len(views), 2))


def encode(vae, args):
    files, labels, names = data.folder_files(Path(args.dataset.removeprefix("folder:")))
    out, total = Path(args.out), len(files)
    out.mkdir(parents=True, exist_ok=True)
    counter = out / "done"
    done = int(counter.read_text()) if counter.exists() else 0
    side = args.size // 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (total, 2, vae.config.latent_channels, side, side)
    mode = "r+" if done else "w+"
    latents = np.lib.format.open_memmap(out / "latents.npy", mode, np.float16, shape)
    if latents.shape != shape:
        raise ValueError(f"{out} has latents of another data set or size: name another --out")
    with ThreadPoolExecutor() as pool:
        for first in range(done, total, args.batch):
            last = min(first + args.batch, total)
            views = pool.map(lambda file: read(file, args.size), files[first:last])
            views = torch.from_numpy(np.stack(list(views)))
            latents[first:last] = encode_views(vae, views, first).cpu().numpy()
            latents.flush()
            (out / "done.new").write_text(str(last))
            (out / "done.new").replace(counter)  # a kill leaves the old number or the new one
            print(f"\r{last:,} of {total:,} images", end="", flush=True)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    np.save(out / "labels.npy", labels)  # last: without it the folder does not load
    print(f"\r{out}: {total:,} images, for train.py --dataset latents:{out}")


@torch.no_grad()
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--dataset", required=True, help="folder:PATH, of images")
    p.add_argument("--vae", required=True, help="autoencoder: name or folder for diffusers")
    p.add_argument("--out", required=True, help="folder to write, or to go on with")
    p.add_argument("--size", type=int, default=256, help="of the images, in pixels")
    p.add_argument("--batch", type=int, default=32, help="images at once")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    try:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(args.vae, low_cpu_mem_usage=False)
        encode(vae.to(args.device).eval(), args)
    except (ImportError, ValueError, OSError) as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
