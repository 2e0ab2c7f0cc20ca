"""
Data sets as uint8 arrays [N, C, H, W], and the sampler that draws the real images of a training step.

    digits        1,797 handwritten digits of 8x8 pixels, in assets/, no network
    mnist         60,000 digits of 28x28         DIR/MNIST/raw/*-ubyte[.gz], else downloaded
    fashion       60,000 garments of 28x28       DIR/FashionMNIST/raw/*-ubyte[.gz], else downloaded
    cifar10       50,000 photographs of 32x32    DIR/cifar-10-batches-py/, else downloaded
    folder:PATH   one sub-folder per class, any images that pillow opens
"""
import codecs
import gzip
import hashlib
import os
import pickle
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps

DIGITS = Path(__file__).with_name("assets") / "digits.npz"
CIFAR10 = ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")
IDX = {  # name: (folder, where to get it, {file: MD5 of its .gz}, class names)
    "mnist": ("MNIST", "https://ossci-datasets.s3.amazonaws.com/mnist/",
              {"train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
               "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
               "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
               "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c"}, [str(i) for i in range(10)]),
    "fashion": ("FashionMNIST", "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                {"train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                 "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
                 "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
                 "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310"},
                ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]),
}


def load(name, data_dir="data", size=None, split="train"):
    """-> images uint8 [N, C, size, size], labels int64 [N], class names. size None: the set's own (folder: 64).

    split: train, or test of mnist, fashion and cifar10; the other sets have none. Raises ValueError or OSError, with a
    line that says what to do, for anything wrong on disk.
    """
    if split == "test" and name != "cifar10" and name not in IDX:
        raise ValueError(f"{name} has no test split")
    if name == "digits":
        with np.load(DIGITS) as f:
            images, labels = np.round(f["images"][:, None] * (255 / 16)).astype(np.uint8), f["labels"]
        names = [str(i) for i in range(10)]
    elif name in IDX:
        images, labels, names = _idx(name, Path(data_dir), split)
    elif name == "cifar10":
        images, labels, names = _cifar10(Path(data_dir), split)
    elif name.startswith("folder:"):
        images, labels, names = _folder(Path(name.removeprefix("folder:")), Path(data_dir), size or 64)
    else:
        raise ValueError(f"unknown data set {name!r}: choose digits, mnist, fashion, cifar10 or folder:PATH")
    images, labels = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    if size and size != images.shape[-1]:
        images = torch.cat([F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
                            .round().clamp(0, 255).byte() for part in images.split(1000)])
    return images, labels, names


class Sampler:
    """Draws real images by label. The array lives on the device unless it is over max_bytes: then it stays where it is.

    images uint8 [N, C, H, W], labels int64 [N]; flip: mirror half of the images (photographs, not digits).
    """

    def __init__(self, images, labels, device, flip=False, max_bytes=8 * 2**30):
        self.images = images.to(device) if images.nbytes <= max_bytes else images
        self.labels = labels.to(device)
        self.order = labels.argsort(stable=True).to(device)                     # the images of class 0, of class 1, ...
        self.count = labels.bincount().to(device)                                                                # [K]
        self.start = self.count.cumsum(0) - self.count                                           # where a class begins
        self.most = int(self.count.max())
        self.device, self.flip = device, flip

    def draw(self, labels, n_pos, n_unc, generator, mine=slice(None)):
        """Positives [L, P, C, H, W] of labels [L] without replacement, and [L, U, C, H, W] of any class, in [-1, 1].

        With mine, a slice of the labels, only that share is fetched, though all is drawn: the ranks of a job use the
        same generator, and what a label gets does not depend on how many they are. A class needs n_pos images.
        """
        L, rand = len(labels), dict(generator=generator, device=self.device)
        count = self.count[labels]
        lot = torch.rand(L, self.most, **rand)
        lot = lot.masked_fill(torch.arange(self.most, device=self.device) >= count[:, None], -1)      # no such image
        pos = self.order[self.start[labels, None] + lot.topk(n_pos).indices]                                   # [L, P]
        unc = torch.randint(len(self.images), (L, n_unc), **rand)                                              # [L, U]
        index = torch.cat([pos, unc], dim=1)
        mirror = torch.rand(index.shape, **rand) < 0.5
        images = self._fetch(index[mine], mirror[mine])                                             # [L, P+U, C, H, W]
        return images[:, :n_pos], images[:, n_pos:]

    def batch(self, n, generator, mine=slice(None)):
        """Any n images [n, C, H, W] in [-1, 1] and their labels [n]; with mine, that share of them."""
        index = torch.randint(len(self.images), (n,), generator=generator, device=self.device)
        mirror = torch.rand(n, generator=generator, device=self.device) < 0.5
        return self._fetch(index[mine], mirror[mine]), self.labels[index[mine]]

    def _fetch(self, index, mirror):
        images = to_float(self.images[index.to(self.images.device)].to(self.device))
        return torch.where(mirror[..., None, None, None], images.flip(-1), images) if self.flip else images


def to_float(images):
    """uint8 -> float in [-1, 1]"""
    return images.to(torch.get_default_dtype()) / 127.5 - 1


def to_uint8(images):
    """[-1, 1] -> uint8, the inverse of to_float"""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_image(image, path, scale=1):
    """uint8 [C, H, W] (1 or 3 channels) to a file, each pixel drawn scale x scale."""
    array = image.cpu().permute(1, 2, 0).numpy()
    array = array.repeat(scale, 0).repeat(scale, 1)
    temporary = f"{path}.tmp"
    Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(temporary, format="png")
    os.replace(temporary, path)


def save_grid(images, path, columns):
    """uint8 [n, C, H, W] as one PNG, row by row; small images enlarged to about 56 pixels."""
    images = torch.cat([images, images.new_zeros(-len(images) % columns, *images.shape[1:])])
    grid = rearrange(F.pad(images, (1, 1, 1, 1)), "(row column) c h w -> c (row h) (column w)", column=columns)
    save_image(grid, path, max(1, round(56 / images.shape[-1])))


def _progress(text, i, n):
    if sys.stderr.isatty():
        print(f"\r{text}: {i:,} of {n:,}", end="\n" if i >= n else "", file=sys.stderr, flush=True)


def _download(url, md5, path):
    """Downloads to a temporary name, checks, moves into place: path never holds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + f".{os.getpid()}.part")
    print(f"downloading {url}")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(part, "wb") as file:
            total = int(response.headers.get("Content-Length", 0))
            while block := response.read(1 << 20):
                file.write(block)
                _progress(f"{path.name}, bytes", file.tell(), total)
        _check(part, md5, url)
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot download {url} ({error}): put the file at {path} by hand") from None
    finally:
        part.unlink(missing_ok=True)


def _check(path, md5, source):
    found = hashlib.md5(path.read_bytes()).hexdigest()
    if found != md5:
        raise ValueError(f"{source} has MD5 {found}, not {md5}: it is damaged or not the official file; delete it")


def _idx(name, data_dir, split):
    folder, url, files, names = IDX[name]
    arrays = []
    for file, md5 in files.items():
        if file.startswith("train") != (split == "train"):
            continue
        plain = data_dir / folder / "raw" / file
        packed = plain.with_name(file + ".gz")
        if not plain.exists() and not packed.exists():
            _download(url + packed.name, md5, packed)
        path = plain if plain.exists() else packed
        try:
            raw = path.read_bytes() if path == plain else gzip.decompress(path.read_bytes())
            dims = np.frombuffer(raw, ">i4", raw[3], offset=4)     # idx: 0, 0, type, number of dimensions; big-endian
            array = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(dims)
        except (ValueError, IndexError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is not a whole idx file ({error}): delete it and run again") from None
        arrays.append(array)
    images, labels = arrays
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(f"{data_dir / folder} holds images {images.shape} and labels {labels.shape}: they do not fit; "
                         "delete it and run again")
    return images[:, None].copy(), labels, names


class _CifarUnpickler(pickle.Unpickler):
    """Unpickles what the CIFAR-10 batches hold, numpy arrays and text, and nothing that could run code."""
    ALLOWED = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype,
               "encode": codecs.encode}

    def find_class(self, module, name):
        if module.split(".")[0] in ("numpy", "_codecs") and name in self.ALLOWED:
            return self.ALLOWED[name]
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")


def _cifar10(data_dir, split):
    folder, archive = data_dir / "cifar-10-batches-py", data_dir / "cifar-10-python.tar.gz"
    if not folder.exists():
        url, md5 = CIFAR10
        if archive.exists():
            _check(archive, md5, archive)
        else:
            _download(url, md5, archive)
        with tempfile.TemporaryDirectory(dir=data_dir) as tmp, tarfile.open(archive) as tar:
            tar.extractall(tmp, filter="data")
            os.replace(Path(tmp) / folder.name, folder)
    images, labels = [], []
    for file in ([f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]) + ["batches.meta"]:
        try:
            with open(folder / file, "rb") as f:
                batch = _CifarUnpickler(f, encoding="bytes").load()
            if file == "batches.meta":
                names = [name.decode() for name in batch[b"label_names"]]
            else:
                images.append(batch[b"data"].reshape(-1, 3, 32, 32))
                labels.append(batch[b"labels"])
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{folder / file} cannot be read ({error}): delete {folder} and run again") from None
    return np.concatenate(images), np.concatenate(labels), names


def _folder(root, data_dir, size):
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    known = Image.registered_extensions()
    classes = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    files = [(k, f) for k, d in enumerate(classes) for f in sorted(d.rglob("*"))
             if f.suffix.lower() in known and not f.name.startswith(".")]
    if not files:
        raise ValueError(f"{root} has no images: it needs one sub-folder per class with the images in it")
    labels = np.array([k for k, _ in files])
    count = np.bincount(labels, minlength=len(classes))
    if not count.all():
        raise ValueError(f"{classes[count.argmin()]} has no images: remove it or fill it")
    stats = [(str(f), stat.st_size, stat.st_mtime_ns) for _, f in files for stat in [f.stat()]]
    cache = data_dir / f"{root.resolve().name}-{size}-{hashlib.md5(repr(stats).encode()).hexdigest()[:12]}.npy"
    if not cache.exists():
        print(f"reading {len(files):,} images of {root} into {cache}")
        data_dir.mkdir(parents=True, exist_ok=True)
        part = cache.with_name(cache.name + f".{os.getpid()}.part")
        try:
            array = np.lib.format.open_memmap(part, "w+", np.uint8, (len(files), 3, size, size))
            for i, (_, file) in enumerate(files):
                array[i] = _read_image(file, size)
                if i % 100 == 99 or i + 1 == len(files):
                    _progress(f"{root}, images", i + 1, len(files))
            array.flush()
            os.replace(part, cache)
        finally:
            part.unlink(missing_ok=True)
    return np.load(cache, mmap_mode="c"), labels, [d.name for d in classes]


def _read_image(path, size):
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} does not open as an image ({error}): repair or remove it") from None
