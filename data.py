"""
Data sets as arrays, the sampler that draws the real images of a step, and image files.

    digits        1,797 handwritten digits of 8x8 pixels, in assets/, no network
    mnist         60,000 digits of 28x28         DIR/MNIST/raw/*-ubyte[.gz], else downloaded
    fashion       60,000 garments of 28x28       DIR/FashionMNIST/raw/*-ubyte[.gz], else downloaded
    cifar10       50,000 photographs of 32x32    DIR/cifar-10-batches-py/, else downloaded
    folder:PATH   one sub-folder per class, any images that pillow opens; or images alone
    npz:FILE      uint8 arr_0 [N, H, W, C], as sample.py writes it, and labels, if there are any;
                  or float arr_0 [N, C, H, W], taken as it is: latents, spectrograms, fields
    latents:DIR   what `python data.py encode` has made of any of these: see latents.py

At the end: types of arguments, errors and ranks, which all scripts share.
"""

import argparse
import codecs
import gzip
import hashlib
import json
import os
import pickle
import sys
import tarfile
import tempfile
import urllib.request
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps

Image.init()
FORMATS = tuple(set(Image.OPEN) - {"EPS"})  # pillow gives those to an interpreter of PostScript
MNIST = ("MNIST", "https://ossci-datasets.s3.amazonaws.com/mnist/")
FASHION = ("FashionMNIST", "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/")
CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = {  # of what is downloaded
    ("MNIST", "train-images-idx3-ubyte.gz"): "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    ("MNIST", "train-labels-idx1-ubyte.gz"): "d53e105ee54ea40749a09fcbcd1e9432",
    ("MNIST", "t10k-images-idx3-ubyte.gz"): "9fb629c4189551a2d022fa330f9573f3",
    ("MNIST", "t10k-labels-idx1-ubyte.gz"): "ec29112dd5afa0611ce80d1b7f02629c",
    ("FashionMNIST", "train-images-idx3-ubyte.gz"): "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    ("FashionMNIST", "train-labels-idx1-ubyte.gz"): "25c81989df183df01b3e8a0aad5dffbe",
    ("FashionMNIST", "t10k-images-idx3-ubyte.gz"): "bef4ecab320f06d8554ea6380940ec79",
    ("FashionMNIST", "t10k-labels-idx1-ubyte.gz"): "bb300cfdad3c16e7a12a480ee83cd310",
    "cifar10": "c58f30108f718f92721af3b95e74349a",
}
GARMENTS = ["T-shirt", "trouser", "pullover", "dress", "coat"]
GARMENTS += ["sandal", "shirt", "sneaker", "bag", "ankle boot"]


def load(name, data_dir="data", size=None, split="train"):
    """-> images uint8 [N, C, size, size], or float32 of some npz, labels int64 [N], class names.

    Of latents:DIR the images are float16, or uint8, [N, V, C, size, size]: V views of each.
    size None: the set's own (folder: 64). split: train, or test of mnist, fashion and cifar10; the
    other sets have none. Raises ValueError or OSError, with a line that says what to do, for
    anything wrong on disk.
    """
    data_dir = Path(data_dir)
    if split == "test" and name not in ("mnist", "fashion", "cifar10"):
        raise ValueError(f"{name} has no test split")
    if name == "digits":
        images, labels, names = load_digits()
    elif name == "mnist":
        images, labels, names = load_idx(*MNIST, data_dir, split, [str(i) for i in range(10)])
    elif name == "fashion":
        images, labels, names = load_idx(*FASHION, data_dir, split, GARMENTS)
    elif name == "cifar10":
        images, labels, names = load_cifar10(data_dir, split)
    elif name.startswith("folder:"):
        images, labels, names = load_folder(Path(name[7:]), data_dir, size or 64)
    elif name.startswith("npz:"):
        images, labels, names = load_npz(Path(name[4:]))
    elif name.startswith("latents:"):
        import latents  # here: it needs this file

        images, labels, names, _ = latents.load(name[8:])
        if size not in (None, images.shape[-1]):
            side = f"{images.shape[-1]} x {images.shape[-1]}"
            raise ValueError(f"{name} is {side}, and views are not resized to {size}")
        return images, labels, names
    else:
        known = "digits, mnist, fashion, cifar10, folder:PATH, npz:FILE or latents:DIR"
        raise ValueError(f"unknown data set {name!r}: choose {known}")
    N, _, H, W = images.shape
    if H != W and name.startswith("npz:"):
        raise ValueError(f"{name} holds images of {W} x {H}, and this code wants square ones")
    if not N or labels.shape != (N,) or labels.min() < 0 or labels.max() >= len(names) or H != W:
        found = f"{N} images of {W} x {H} and {len(labels)} labels of {len(names)} classes"
        raise ValueError(f"{name} in {data_dir} holds {found}, which do not fit: delete it")
    images, labels = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    if size and size != H:
        if images.is_floating_point():
            raise ValueError(f"{name} is {H} x {H}, and arrays of floats are not resized to {size}")
        images = torch.cat([resize(part, size) for part in images.split(1000)])
    return images, labels, names


def load_digits():
    with np.load(Path(__file__).with_name("assets") / "digits.npz") as f:
        images = np.round(f["images"][:, None] * (255 / 16)).astype(np.uint8)
        return images, f["labels"], [str(i) for i in range(10)]


def load_idx(folder, url, data_dir, split, names):
    start = {"train": "train", "test": "t10k"}[split]
    arrays = []
    for file in (f"{start}-images-idx3-ubyte", f"{start}-labels-idx1-ubyte"):
        path = data_dir / folder / "raw" / file
        if not path.exists():
            path = path.with_name(f"{file}.gz")
        if not path.exists():
            download(url + path.name, MD5[folder, path.name], path)
        try:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
                raw = stream.read(2**27)  # more than any of these files, less than a bomb
            # 0, 0, type, number of dimensions, then those, big-endian
            shape = np.frombuffer(raw, ">i4", raw[3], offset=4)
            dimensions = 3 if "images" in file else 1
            if raw[:3] != b"\0\0\x08" or len(shape) != dimensions or 0 in shape:
                raise ValueError("another type of array")
            arrays.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape))
        except Exception as error:  # a damaged file can raise anything
            raise ValueError(f"{path} is not a whole idx file ({error}): delete it") from None
    images, labels = arrays
    return images[:, None].copy(), labels, names


class ArraysOnly(pickle.Unpickler):
    """Unpickles what CIFAR-10 holds, numpy arrays and text, and nothing that could run code."""

    def find_class(self, module, name):
        reconstruct = np.empty(0).__reduce__()[0]
        known = {"_reconstruct": reconstruct, "ndarray": np.ndarray, "dtype": np.dtype}
        if module.split(".")[0] == "numpy" and name in known:
            return known[name]
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")


def load_cifar10(data_dir, split):
    folder, archive = data_dir / "cifar-10-batches-py", data_dir / "cifar-10-python.tar.gz"
    if not folder.exists():
        if archive.exists():
            check_md5(hashlib.md5(archive.read_bytes()), MD5["cifar10"], archive)
        else:
            download(CIFAR10, MD5["cifar10"], archive)
        try:
            with tempfile.TemporaryDirectory(dir=data_dir) as part, tarfile.open(archive) as tar:
                tar.extractall(part, filter="data")  # nothing outside, no links that lead out
                os.replace(Path(part) / folder.name, folder)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{archive} cannot be unpacked ({error}): delete it") from None
    files = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    images, labels = [], []
    for file in [*files, "batches.meta"]:
        try:
            with open(folder / file, "rb") as f:
                batch = ArraysOnly(f, encoding="bytes").load()
            if file == "batches.meta":
                names = [name.decode() for name in batch[b"label_names"]]
                continue
            images.append(batch[b"data"].reshape(-1, 3, 32, 32).astype(np.uint8, casting="no"))
            labels.append(np.array(batch[b"labels"], dtype=np.int64).reshape(len(images[-1])))
        except Exception as error:  # a damaged pickle can raise anything
            wrong = f"{folder / file} cannot be read ({' '.join(str(error).split())})"
            raise ValueError(f"{wrong}: delete {folder} and run again") from None
    return np.concatenate(images), np.concatenate(labels), names


def folder_files(root):
    """The images of a folder -> paths [N], labels int64 [N], class names. Raises ValueError."""
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    classes = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if unlabelled(f"folder:{root}"):
        mixed = [d for d in classes if image_files(d)]
        if mixed:
            raise ValueError(f"{root} has images and classes, such as {mixed[0].name}: move either")
        classes = [root]
    files = [(label, f) for label, d in enumerate(classes) for f in image_files(d)]
    if not files:
        raise ValueError(f"{root} has no images: it needs some, or one sub-folder per class")
    labels = np.array([label for label, _ in files])
    count = np.bincount(labels, minlength=len(classes))
    if not count.all():
        raise ValueError(f"{classes[count.argmin()]} has no images: remove it or fill it")
    return [f for _, f in files], labels, [d.resolve().name for d in classes]


def load_folder(root, data_dir, size):
    files, labels, names = folder_files(root)
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    digest = hashlib.md5(repr(stats).encode()).hexdigest()[:12]  # other files, another cache
    cache = data_dir / f"{root.resolve().name}-{size}-{digest}.npy"
    shape = (len(files), 3, size, size)
    if not cache.exists():
        print(f"reading {len(files):,} images of {str(root)!r} into {str(cache)!r}")
        data_dir.mkdir(parents=True, exist_ok=True)
        bad = []
        bar = progress(str(root), len(files))
        with whole(cache) as output, bar as update:  # one by one: they may not fit the memory
            header = dict(descr="|u1", fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(output, header)
            for file in files:
                try:
                    image = ImageOps.fit(read_image(file), (size, size), Image.Resampling.LANCZOS)
                    output.write(np.asarray(image).transpose(2, 0, 1).tobytes())
                except ValueError as error:
                    bad.append(str(error))
                update(1)
            if bad:
                more = f"; and {len(bad) - 3} others" if len(bad) > 3 else ""
                raise ValueError(f"these do not open as images: {'; '.join(bad[:3])}{more}")
    try:
        images = np.load(cache, mmap_mode="c")
        if images.shape != shape or images.dtype != np.uint8:
            raise ValueError(f"it holds {images.dtype} {images.shape}")
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{cache} is damaged ({error}): delete it and run again") from None
    return images, labels, names


def load_npz(path):
    try:
        with np.load(path) as file:  # no pickles, as is its default
            images = file["arr_0"]
            labels = file["labels"] if "labels" in file.files else np.zeros(len(images), np.int64)
        kind, shape = images.dtype.kind, images.shape
        if len(shape) != 4 or not images.size or (kind != "f" and images.dtype != np.uint8):
            raise ValueError(f"arr_0 is {images.dtype} {shape}")
        if labels.shape != shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(f"labels are {labels.dtype} {labels.shape} for {shape[0]} images")
        if labels.max() >= len(labels):
            raise ValueError(f"a label is {labels.max()}, more than there are images")
        if kind == "f":
            most = np.abs(images).max()
            if not most <= 100:  # NaN is not
                raise ValueError(f"floats up to {most:g}: scale them to about 1")
            images = images.astype(np.float32)
        else:
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    except Exception as error:  # what numpy raises for a damaged file has no type in common
        raise ValueError(f"{str(path)!r} is no data set ({error})") from None
    return images, labels, [str(i) for i in range(labels.max() + 1)]


def unlabelled(name):
    """Whether a folder has no classes, but images, an npz no labels, or latents a single class."""
    kind, _, path = name.partition(":")
    with suppress(Exception):  # load() says what is wrong
        if kind == "npz":
            with np.load(path) as file:
                return "labels" not in file.files
        if kind == "latents":
            return len(json.loads((Path(path) / "classes.json").read_text())["classes"]) == 1
    return kind == "folder" and len(image_files(Path(path), "*")) > 0


def download(url, md5, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {url}")
    digest = hashlib.md5()
    try:
        with urllib.request.urlopen(url, timeout=60) as response, whole(path) as file:
            total = int(response.headers.get("Content-Length", 0))
            with progress(path.name, total, "B") as update:
                while block := response.read(1 << 20):
                    file.write(block)
                    digest.update(block)
                    update(len(block))
            check_md5(digest, md5, url)
    except OSError as error:
        raise OSError(f"cannot download {url} ({error}): put the file at {path} by hand") from None


def check_md5(digest, md5, source):
    if digest.hexdigest() != md5:
        other = f"MD5 {digest.hexdigest()}, not {md5}"
        raise ValueError(f"{source} is damaged or not the official file, {other}: delete it")


def views(images):
    """Those of images [N, V, C, H, W] to train a generator on: of latents an image and its mirror
    image, which come first; of pixels the random crops, if there are any, as the authors do."""
    if images.ndim == 4:
        return images
    crops = images.dtype == torch.uint8 and images.shape[1] > 2
    return images[:, 2:] if crops else images[:, :2]


class Sampler:
    """Draws real images by label; images uint8 [N, C, H, W], labels int64 [N].

    flip: mirror half of the images (photographs, not digits). Of images [N, V, C, H, W] any of the
    V views is drawn instead. What does not fit a quarter of the free memory of a GPU stays where it
    is: then indices are drawn there, too, and the images of a step are copied from pinned memory
    while the GPU is at work on the step before.
    """

    def __init__(self, images, labels, device, flip=False):
        device = torch.device(device)
        fits = device.type != "cuda" or images.nbytes <= torch.cuda.mem_get_info(device)[0] / 4
        self.home = device if fits else images.device
        self.device = device
        self.flip = flip and images.ndim == 4  # else a mirror image is a view
        self.images = images.to(self.home)
        self.labels = labels.to(self.home)
        self.count = labels.bincount()  # [classes]
        self.most = int(self.count.max())
        self.fewest = int(self.count.min())
        self.count = self.count.to(self.home)
        self.order = labels.argsort(stable=True).to(self.home)  # of class 0, of class 1, ...
        self.start = self.count.cumsum(0) - self.count  # where a class begins

    def draw(self, labels, n_pos, n_unc, generator, mine=slice(None)):
        """Real images in [-1, 1] for labels [L]: positives [L, P, C, H, W] of the label, without
        replacement, and unconditional ones [L, U, C, H, W] of any class.

        With mine, a slice of the labels, only that share is fetched, though all is drawn: the ranks
        of a job use the same generator, and what a label gets does not depend on how many they are.
        A class needs n_pos images. generator and labels: on self.home.
        """
        L, device = len(labels), self.home
        lot = torch.rand(L, self.most, generator=generator, device=device)
        missing = torch.arange(self.most, device=device) >= self.count[labels, None]
        place = lot.masked_fill(missing, -1).topk(n_pos).indices  # a class is as large as it is
        pos = self.order[self.start[labels, None] + place]  # [L, P]
        unc = torch.randint(len(self.images), (L, n_unc), generator=generator, device=device)
        index = torch.cat([pos, unc], dim=1)
        chance = torch.rand(index.shape, generator=generator, device=device)
        images = self.fetch(index[mine], chance[mine])  # [L, P + U, C, H, W]
        return images[:, :n_pos], images[:, n_pos:]

    def batch(self, n, generator, mine=slice(None)):
        """Any n images [n, C, H, W] in [-1, 1] and their labels [n]; with mine, that share."""
        index = torch.randint(len(self.images), (n,), generator=generator, device=self.home)
        chance = torch.rand(n, generator=generator, device=self.home)
        return self.fetch(index[mine], chance[mine]), self.labels[index[mine]].to(self.device)

    def fetch(self, index, chance):
        """Images by index; chance, uniform in [0, 1), says which are mirrored, or which view."""
        mirror = chance < 0.5
        if self.images.ndim == 5:
            view = (chance * self.images.shape[1]).long()
            images = self.images[index, view]
        else:
            images = self.images[index]
        if self.home != self.device:
            images, mirror = images.pin_memory(), mirror.pin_memory()
        images = to_float(images.to(self.device, non_blocking=True))
        mirror = mirror.to(self.device, non_blocking=True)
        if self.flip:
            images = torch.where(mirror[..., None, None, None], images.flip(-1), images)
        return images


def to_float(images):
    """uint8 -> float in [-1, 1]; floats stay as they are."""
    if images.is_floating_point():
        return images.to(torch.get_default_dtype())
    return images.to(torch.get_default_dtype()) / 127.5 - 1


def to_uint8(images):
    """[-1, 1] -> uint8, the inverse of to_float; what is outside is clamped."""
    if images.dtype == torch.uint8:
        return images
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def resize(images, size):
    """uint8 [B, C, H, W] -> uint8 [B, C, size, size]"""
    images = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return images.round().clamp(0, 255).byte()


# Image files


def image_files(folder, pattern="**/*"):
    """Every file below a folder, or just in it by pattern *, that is named like an image, in order;
    no hidden ones."""
    known = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
    files = []
    for f in sorted(folder.glob(pattern)):
        hidden = any(part.startswith(".") for part in f.relative_to(folder).parts)
        if f.suffix.lower() in known and f.is_file() and not hidden:
            files.append(f)
    return files


def read_image(path):
    """An image file as a pillow image, RGB, upright; the first of an animation.

    Raises ValueError for a file that is damaged, or larger than pillow's limit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; but a bomb is an error
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 8
                    image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype("u1"))
                return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders of damaged files raise anything
        reason = " ".join(str(error).split()).replace(str(path), "it") or type(error).__name__
        raise ValueError(f"{str(path)!r} ({reason})") from None


@contextmanager
def whole(path):
    """A file to write bytes to, that takes the name path only when all of it is on the disk."""
    part = f"{path}.{os.getpid()}.{os.urandom(2).hex()}.tmp"  # nobody else's, on no other node
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine may leave an empty file
        os.replace(part, path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch.save makes the first of the second
            raise error.__context__ from None
        raise
    finally:
        Path(part).unlink(missing_ok=True)


def save_image(image, path, scale=1):
    """uint8 [C, H, W] of 1 or 3 channels to a PNG file, each pixel drawn scale x scale."""
    array = image.cpu().permute(1, 2, 0).numpy()
    array = array.repeat(scale, 0).repeat(scale, 1)
    with whole(path) as file:
        Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(file, "png")


def save_grid(images, path, columns):
    """uint8 [n, C, H, W] as one PNG, row by row; small images enlarged to about 56 pixels."""
    missing = images.new_zeros(-len(images) % columns, *images.shape[1:])
    tiles = F.pad(torch.cat([images, missing]), (1, 1, 1, 1))
    grid = rearrange(tiles, "(row column) c h w -> c (row h) (column w)", column=columns)
    save_image(grid, path, max(1, round(56 / images.shape[-1])))


# What all scripts share: arguments, errors, and the processes of torchrun


def number(kind, least, most):
    """A type for argparse: a number, int or float, from least to most, ends included; no NaN."""

    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


positive_int = number(int, 1, 10**9)
share = number(float, 0, 1)
seed = number(int, 0, 2**63 - 1)


def device(text):
    """A type for argparse: a device that is there; cuda is that of this process under torchrun."""
    try:
        if text == "cuda":
            text = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(text)
        torch.zeros(1, device=text)
        return torch.device(text)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{text} is not to be had here") from None


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def progress(what, total, unit=" images"):
    """A bar of tqdm on a terminal: gives a function to call with how many more are done."""
    quiet = rank() > 0 or not sys.stderr.isatty()
    try:
        from tqdm import tqdm
    except ImportError:
        if not quiet:
            print(f"{what}: pip install tqdm shows how far it is", file=sys.stderr)
        yield lambda n: None
        return
    with tqdm(desc=what, total=total, unit=unit, unit_scale=True, disable=quiet) as bar:
        yield bar.update


waiting_room = None  # the ranks, for what may take hours; elsewhere ten minutes mean that one hangs


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def start_ranks(device):
    """Joins the other processes of torchrun, if there are any."""
    global waiting_room
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
        waiting_room = dist.new_group(backend="gloo", timeout=timedelta(hours=12))


def first_on_node():
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


@contextmanager
def node_first():
    """The first rank of every node goes through this alone, to download and to fill caches."""
    if not first_on_node():
        wait()
    yield
    if first_on_node():
        wait()


def gather(items):
    """Lists of all ranks, dealt like cards, as one list on the first rank; None on the others."""
    if world_size() == 1:
        return items
    hands = [None] * world_size() if rank() == 0 else None
    dist.gather_object(items, hands, group=waiting_room)
    if rank() > 0:
        return None
    together = [None] * sum(len(hand) for hand in hands)
    for i, hand in enumerate(hands):
        together[i :: world_size()] = hand
    return together


def wait():
    """Until all ranks are here, which may take hours."""
    if world_size() > 1:
        dist.barrier(waiting_room)


def say(text):
    """print(), of the first rank only; above a bar, if there is one."""
    if rank() == 0:
        tqdm = sys.modules.get("tqdm")
        (tqdm.tqdm.write if tqdm else print)(text)
        sys.stdout.flush()


def finish():
    """Waits for the first rank, which may still be judging samples, to leave together."""
    wait()
    if world_size() > 1:
        dist.destroy_process_group()


def one_line(error):
    """What an error of a library says, and of what type it is."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def run(main):
    """Runs a script: what a user can get wrong is one line and status 2, and Ctrl-C status 130."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    import latents

    run(latents.main)
