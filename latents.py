"""
A data set passed through an autoencoder once, so that a generator trains on latents.

The paper's ImageNet recipe: every image and its mirror image, 256 x 256, are sampled latents of the
SD-VAE, 4 x 32 x 32; the ranks of torchrun share the work
$ python data.py encode --dataset folder:train --vae stabilityai/sd-vae-ft-mse --out latents/
$ torchrun --standalone --nproc_per_node=8 data.py encode ...
$ python train.py --dataset latents:latents/

Without --vae they are kept as pixels, here with six random crops of each
$ python data.py encode --dataset folder:train --size 256 --crops 6 --out crops/

What was killed goes on by the same command. A folder with blocks/ in it is not whole.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import data

BLOCK = 256  # images that are written, and marked as whole, at once
THREADS = 8  # of each rank, to open images
BOX, BICUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC


# Views of an image


def centre_crop(image, size):
    """The middle of a pillow image, size x size, as ADM crops ImageNet."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image, size, rng):
    """Anything from 0.2 of a pillow image to all of it, size x size, mirrored or not."""
    for _ in range(10):
        area = image.width * image.height * rng.uniform(0.2, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(rng.integers(image.width - width + 1))
            top = int(rng.integers(image.height - height + 1))
            crop = image.crop((left, top, left + width, top + height))
            crop = crop.resize((size, size), BICUBIC)
            break
    else:  # it is very long
        crop = centre_crop(image, size)
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


class Views:
    """The images of a data set, opened one by one; each is V = 2 + crops views of it.

    color: grey arrays become RGB, as files always do; digest: MD5 of the names of the files, or of
    the arrays. Raises ValueError or OSError.
    """

    def __init__(self, dataset, data_dir, size, crops, seed, color):
        self.size, self.crops, self.seed, self.color = size, crops, seed, color
        if dataset.startswith("folder:"):
            self.items, self.labels, self.names = data.folder_files(Path(dataset[7:]))
            self.channels = 3
            content = os.fsencode("\n".join(map(str, self.items)))
        else:
            images, labels, self.names = data.load(dataset, data_dir)
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
                raise ValueError(f"{dataset} holds no images of 8 bits, grey or in colour")
            self.items, self.labels = images.numpy(), labels.numpy()
            self.channels = 3 if color else images.shape[1]
            content = self.items.tobytes() + self.labels.tobytes()
        self.digest = hashlib.md5(content).hexdigest()

    def read(self, i):
        """Image i, its mirror image, then the random crops: uint8 [V, C, size, size]."""
        item = self.items[i]
        if isinstance(item, Path):
            image = data.read_image(item)
        else:
            image = Image.fromarray(item[0] if len(item) == 1 else item.transpose(1, 2, 0))
        if self.color:
            image = image.convert("RGB")
        centre = centre_crop(image, self.size)
        rng = np.random.default_rng((self.seed, i))  # whoever reads it, and whenever
        views = [centre, ImageOps.mirror(centre)]
        views += [random_crop(image, self.size, rng) for _ in range(self.crops)]
        views = np.stack([np.asarray(view) for view in views])
        return views.reshape(len(views), self.size, self.size, -1).transpose(0, 3, 1, 2)


# The autoencoder


def load_vae(name, device, channels=None):
    """An autoencoder of diffusers; with channels, for latents of so many. Raises ValueError."""
    wrong = "cannot decode this generator's latents" if channels else "does not load"
    try:
        from diffusers import AutoModel

        vae = AutoModel.from_pretrained(name, low_cpu_mem_usage=False)  # True wants accelerate
        if channels not in (None, vae.config.latent_channels):
            decodes = f"it decodes {vae.config.latent_channels} channels"
            raise ValueError(f"{decodes}, the generator gives {channels}")
        return vae.to(device).eval()
    except ImportError:
        raise ValueError("--vae needs pip install diffusers") from None
    except Exception as error:  # hub, files, configurations: each raises its own
        raise ValueError(f"--vae {name} {wrong} ({data.one_line(error)})") from None


def factor_and_shift(vae):
    """The factor is the authors': 0.18215 for the SD-VAE, 1 for tiny autoencoders made for it."""
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


@torch.no_grad()
def encode_images(vae, images, generator):
    """Images [B, 3, H, W] in [-1, 1] -> a latent of each, [B, C, h, w], sampled.

    generator: on the CPU. Each image takes its own numbers from it in turn, whatever B is.
    """
    spread = vae.encode(images).latent_dist
    noise = [torch.randn(spread.mean.shape[1:], generator=generator) for _ in images]
    factor, shift = factor_and_shift(vae)
    return (spread.mean + spread.std * torch.stack(noise).to(images.device) - shift) * factor


@torch.no_grad()
def decode(vae, latents):
    """Latents [B, C, h, w] -> images [B, 3, H, W] in about [-1, 1]."""
    factor, shift = factor_and_shift(vae)
    parts = (latents / factor + shift).split(8)  # a decoder is memory-hungry
    return torch.cat([vae.decode(part).sample for part in parts])


# The folder: latents.npy, labels.npy, classes.json, and blocks/ as long as it is not whole


def describe(args, views, vae):
    """classes.json: what the folder holds, and all that it depends on."""
    info = {name: getattr(args, name) for name in ("dataset", "size", "vae", "crops", "seed")}
    info |= dict(images=len(views.items), block=BLOCK, md5=views.digest, factor=None, shift=None)
    shape = (views.channels, args.size, args.size)
    if vae:
        info["factor"], info["shift"] = factor_and_shift(vae)
        try:
            black = torch.zeros(1, *shape, device=args.device)
            shape = encode_images(vae, black, torch.Generator())[0].shape
        except Exception as error:  # it may be no autoencoder of this kind, or want other sizes
            wrong = f"cannot encode images of {args.size} pixels ({data.one_line(error)})"
            raise ValueError(f"--vae {args.vae} {wrong}") from None
    info["shape"] = [len(views.items), 2 + args.crops, *shape]
    return info | {"classes": views.names}


def rows(block, n):
    """The images of a block, of n in all."""
    return range(n)[block * BLOCK : (block + 1) * BLOCK]


def missing(folder, n):
    """The blocks of n images that are not marked as whole."""
    if not (folder / "blocks").exists():
        return []
    every = range(math.ceil(n / BLOCK))
    return [block for block in every if not (folder / "blocks" / str(block)).exists()]


def prepare(folder, info, labels):
    """A folder for what info says: new, or begun by the same command.

    Raises ValueError if something else is there, or too little room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan, blocks = folder / "classes.json", folder / "blocks"
    if plan.exists():
        old = read_json(plan)
        for name, value in info.items():
            if old.get(name) != value:
                differs = f"{name} {str(old.get(name))[:80]}, this command has {str(value)[:80]}"
                raise ValueError(f"{folder} has {differs}: give another --out")
    elif any(folder.iterdir()) and not blocks.exists():
        raise ValueError(f"{folder} holds something else: give another --out")
    else:
        blocks.mkdir(exist_ok=True)
    shape, kind = info["shape"], "<f2" if info["vae"] else "|u1"
    row = math.prod(shape[1:]) * np.dtype(kind).itemsize
    left = missing(folder, shape[0])
    if left:
        need, free = sum(len(rows(b, shape[0])) for b in left) * row, shutil.disk_usage(folder).free
        more = " more" if plan.exists() else ""
        room = f"{folder} takes {need / 1e9:.1f} GB{more}, {free / 1e9:.1f} GB are free"
        if need > free:
            raise ValueError(room)
        data.say(room)
    if plan.exists():
        return
    with data.whole(folder / "labels.npy") as file:
        np.save(file, labels)
    with data.whole(folder / "latents.npy") as file:
        header = dict(descr=kind, fortran_order=False, shape=tuple(shape))
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + shape[0] * row)  # takes no room yet
    with data.whole(plan) as file:
        file.write(json.dumps(info, indent=1).encode())


def read_json(path):
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({data.one_line(error)})") from None


def write_block(folder, block, latents):
    """Latents [n, V, C, h, w] to their place in latents.npy, and when they are on the disk, a mark.

    No mmap: there a full disk would be a signal, not an error.
    """
    try:
        with open(folder / "latents.npy", "r+b") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            file.seek(block * BLOCK * latents[0].nbytes, os.SEEK_CUR)
            file.write(latents.tobytes())
            file.flush()
            os.fsync(file.fileno())
        (folder / "blocks" / str(block)).touch()
    except OSError as error:
        again = "what is there stays, the same command goes on"
        raise OSError(f"cannot write {folder} ({error}): {again}") from None


def encode_block(block, images, vae, args):
    """Views of images, as they are read, -> latents [n, V, C, h, w]; without a vae as they are."""
    if not vae:
        return np.stack(list(images))
    seed = np.random.SeedSequence((args.seed, block)).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(seed))
    at_once, latents = max(1, args.batch // (2 + args.crops)), []
    while some := list(islice(images, at_once)):
        views = torch.from_numpy(np.concatenate(some)).to(args.device)
        found = encode_images(vae, data.to_float(views), generator)
        latents.append(found.half().cpu().unflatten(0, (len(some), -1)))
    return torch.cat(latents).numpy()


def encode(folder, views, blocks, vae, args):
    """Encodes and writes blocks; returns what does not open as an image, one of a block at most."""
    n, bad = len(views.items), []
    total = sum(len(rows(block, n)) for block in blocks)
    with ThreadPoolExecutor(THREADS) as pool, data.progress(str(folder), total) as update:
        reading = ((block, pool.map(views.read, rows(block, n))) for block in blocks)
        # A block is read while the one before it is encoded
        for (block, images), _ in pairwise(chain(reading, [None])):
            try:
                latents = encode_block(block, images, vae, args)
            except ValueError as error:  # the others first: they may take hours
                bad.append(str(error))
                continue
            except torch.OutOfMemoryError:
                raise ValueError(f"{args.batch} views do not fit the GPU: lower --batch") from None
            write_block(folder, block, latents)
            update(len(latents))
    return bad


def load(folder):
    """What main() has written -> latents float16, or uint8 images, [N, V, C, h, w], mapped into
    memory; labels int64 [N]; names of the classes; classes.json. Raises ValueError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: python data.py encode makes it")
    if (folder / "blocks").exists():
        raise ValueError(f"{folder} is not whole: the same python data.py encode goes on")
    try:
        info = read_json(folder / "classes.json")
        latents = np.load(folder / "latents.npy", mmap_mode="c")
        labels = np.load(folder / "labels.npy")
        N, _, _, h, w = shape = tuple(info["shape"])
        kind = np.float16 if info["vae"] else np.uint8
        if latents.shape != shape or latents.dtype != kind or h != w or not latents.size:
            wanted = f"{np.dtype(kind)} {shape}"
            raise ValueError(f"latents.npy is {latents.dtype} {latents.shape}, not {wanted}")
        if labels.shape != (N,) or labels.dtype != np.int64:
            raise ValueError(f"labels.npy is {labels.dtype} {labels.shape} for {N} images")
        if labels.min() < 0 or labels.max() >= len(info["classes"]):
            raise ValueError(f"labels.npy has others than those of {len(info['classes'])} classes")
        if info["vae"] and not np.isfinite(latents[:1000]).all():
            raise ValueError("latents.npy has numbers that are not finite")
    except Exception as error:  # what numpy raises for a damaged file has no type in common
        raise ValueError(f"{folder} is damaged ({data.one_line(error)})") from None
    return torch.from_numpy(latents), torch.from_numpy(labels), info["classes"], info


def parse(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("command", choices=["encode"])
    p.add_argument("--dataset", required=True, help="folder:PATH, mnist, fashion, cifar10, digits")
    p.add_argument("--data_dir", default="data", help="where data sets are, or are downloaded to")
    p.add_argument("--size", type=data.number(int, 8, 4096), default=256, help="of a crop, pixels")
    p.add_argument("--vae", help="name or folder for diffusers; none: pixels")
    p.add_argument("--crops", type=data.number(int, 0, 100), default=0, help="random ones, each")
    p.add_argument("--out", required=True, help="folder, new or to go on with")
    p.add_argument("--batch", type=data.positive_int, default=32, help="views through it at once")
    p.add_argument("--seed", type=data.seed, default=0)
    p.add_argument("--device", type=data.device, default=data.default_device())
    return p.parse_args(argv)


@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    folder = Path(args.out)
    data.start_ranks(args.device)
    with data.node_first():
        vae = load_vae(args.vae, args.device) if args.vae else None
        color = vae is not None
        views = Views(args.dataset, args.data_dir, args.size, args.crops, args.seed, color)
    info = describe(args, views, vae)
    if data.rank() == 0:
        prepare(folder, info, views.labels)
    data.wait()
    n, ranks = len(views.items), data.world_size()
    mine = [block for block in missing(folder, n) if block % ranks == data.rank()]
    bad = data.gather([encode(folder, views, mine, vae, args)])  # None on the other ranks
    bad = list(chain(*bad or []))
    if data.rank() == 0 and not bad:
        if (folder / "blocks").exists():
            done = (folder / "blocks").rename(folder / "done")  # at once, even if killed now
            shutil.rmtree(done)
        shape = " x ".join(map(str, info["shape"][2:]))
        print(f"{folder}: {n:,} images, {2 + args.crops} views of {shape} each, for", end=" ")
        print(f"train.py --dataset latents:{folder}")
    data.finish()
    if bad:
        more = f"; and {len(bad) - 3} others" if len(bad) > 3 else ""
        wrong = f"these do not open as images: {'; '.join(bad[:3])}{more}"
        raise ValueError(f"{wrong}: replace them, and the same command goes on")
