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
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps

Image.init()
FORMATS = tuple(set(Image.OPEN) - {"EPS"})                          # pillow gives those to an interpreter of PostScript
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
    N, _, H, W = images.shape
    if not N or labels.shape != (N,) or labels.min() < 0 or labels.max() >= len(names) or H != W:
        raise ValueError(f"{name} in {data_dir} holds {N} images of {W} x {H} and {len(labels)} labels of {len(names)} "
                         "classes, which do not fit: delete it and run again")
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


@contextmanager
def whole(path):
    """Opens a file to write bytes that takes the name path only when all is on the disk: path is never half a file."""
    part = f"{path}.{os.getpid()}.tmp"
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())                             # else a crash of the machine may leave an empty file
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def save_image(image, path, scale=1):
    """uint8 [C, H, W] (1 or 3 channels) to a PNG file, each pixel drawn scale x scale."""
    array = image.cpu().permute(1, 2, 0).numpy()
    array = array.repeat(scale, 0).repeat(scale, 1)
    with whole(path) as file:
        Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(file, format="png")


def grid(images, columns):
    """uint8 [n, C, H, W] as one image [C, rows * (H + 2), columns * (W + 2)], row by row."""
    images = torch.cat([images, images.new_zeros(-len(images) % columns, *images.shape[1:])])
    return rearrange(F.pad(images, (1, 1, 1, 1)), "(row column) c h w -> c (row h) (column w)", column=columns)


def save_grid(images, path, columns):
    """uint8 [n, C, H, W] as one PNG, row by row; small images enlarged to about 56 pixels."""
    save_image(grid(images, columns), path, max(1, round(56 / images.shape[-1])))


def save_film(frames, path):
    """Images uint8 [C, H, W] of one size as a GIF, enlarged to at least 300 pixels; the last one stays two seconds."""
    scale = -(-300 // frames[0].shape[-1])
    first, *others = [Image.fromarray(frame.expand(3, -1, -1).permute(1, 2, 0).numpy()).quantize(64).resize(
        (frame.shape[2] * scale, frame.shape[1] * scale), Image.Resampling.NEAREST) for frame in frames]
    with whole(path) as file:
        first.save(file, format="gif", save_all=True, append_images=others, loop=0,
                   duration=[80] * len(others) + [2000])


def _progress(text, i, n):
    if sys.stderr.isatty():
        print(f"\r{text}: {i:,} of {n:,}", end="\n" if i >= n else "", file=sys.stderr, flush=True)


def _download(url, md5, path):
    """Downloads to a temporary name, checks, moves into place: path never holds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {url}")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, whole(path) as file:
            total, digest = int(response.headers.get("Content-Length", 0)), hashlib.md5()
            while block := response.read(1 << 20):
                file.write(block)
                digest.update(block)
                _progress(f"{path.name}, bytes", file.tell(), total)
            _check(digest, md5, url)
    except OSError as error:
        raise OSError(f"cannot download {url} ({error}): put the file at {path} by hand") from None


def _check(digest, md5, source):
    if digest.hexdigest() != md5:
        raise ValueError(f"{source} has MD5 {digest.hexdigest()}, not {md5}: it is damaged or not the official file; "
                         "delete it")


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
            with open(path, "rb") if path == plain else gzip.open(path) as stream:
                raw = stream.read(2**27)                                # more than any of these files, less than a bomb
            dims = np.frombuffer(raw, ">i4", raw[3], offset=4)     # idx: 0, 0, type, number of dimensions; big-endian
            if raw[:3] != b"\0\0\x08" or len(dims) != (3 if "images" in file else 1) or (dims <= 0).any():
                raise ValueError("another type of array")
            array = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(dims)
        except Exception as error:  # a damaged file can raise anything
            raise ValueError(f"{path} is not a whole idx file ({error}): delete it and run again") from None
        arrays.append(array)
    images, labels = arrays
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
            _check(hashlib.md5(archive.read_bytes()), md5, archive)
        else:
            _download(url, md5, archive)
        try:
            with tempfile.TemporaryDirectory(dir=data_dir) as tmp, tarfile.open(archive) as tar:
                tar.extractall(tmp, filter="data")                      # nothing outside of tmp, no links that lead out
                os.replace(Path(tmp) / folder.name, folder)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{archive} cannot be unpacked ({error}): delete it and run again") from None
    images, labels = [], []
    for file in ([f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]) + ["batches.meta"]:
        try:
            with open(folder / file, "rb") as f:
                batch = _CifarUnpickler(f, encoding="bytes").load()
            if file == "batches.meta":
                names = [name.decode() for name in batch[b"label_names"]]
            else:
                images.append(batch[b"data"].reshape(-1, 3, 32, 32).astype(np.uint8, casting="no"))
                labels.append(np.array(batch[b"labels"], dtype=np.int64).reshape(len(images[-1])))
        except Exception as error:  # a damaged pickle can raise anything
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder / file} cannot be read ({reason}): delete {folder} and run again") from None
    return np.concatenate(images), np.concatenate(labels), names


def _folder(root, data_dir, size):
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    classes = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    files = [(k, f) for k, d in enumerate(classes) for f in image_files(d)]
    if not files:
        raise ValueError(f"{root} has no images: it needs one sub-folder per class with the images in it")
    labels = np.array([k for k, _ in files])
    count = np.bincount(labels, minlength=len(classes))
    if not count.all():
        raise ValueError(f"{classes[count.argmin()]} has no images: remove it or fill it")
    stats = [(str(f), stat.st_size, stat.st_mtime_ns) for _, f in files for stat in [f.stat()]]
    cache = data_dir / f"{root.resolve().name}-{size}-{hashlib.md5(repr(stats).encode()).hexdigest()[:12]}.npy"
    shape = (len(files), 3, size, size)
    if not cache.exists():
        print(f"reading {len(files):,} images of {str(root)!r} into {str(cache)!r}")
        data_dir.mkdir(parents=True, exist_ok=True)
        bad = []
        with whole(cache) as output:
            np.lib.format.write_array_header_1_0(output, dict(descr="|u1", fortran_order=False, shape=shape))
            for i, (_, file) in enumerate(files):
                try:
                    image = ImageOps.fit(read_image(file), (size, size), Image.Resampling.LANCZOS)
                    output.write(np.asarray(image).transpose(2, 0, 1).tobytes())
                except ValueError as error:
                    bad.append(str(error))
                if i % 100 == 99 or i + 1 == len(files):
                    _progress(f"{root}, images", i + 1, len(files))
            if bad:
                more = f"; and {len(bad) - 3} others" if len(bad) > 3 else ""
                raise ValueError(f"repair or remove what does not open as an image: {'; '.join(bad[:3])}{more}")
    try:
        images = np.load(cache, mmap_mode="c")
        if images.shape != shape or images.dtype != np.uint8:
            raise ValueError(f"it holds {images.dtype} {images.shape}")
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{cache} is damaged ({error}): delete it and run again") from None
    return images, labels, [d.name for d in classes]


def image_files(folder):
    """Every file below a folder that is named like an image, in order, but for hidden ones; links to folders end."""
    known = {extension for extension, format in Image.registered_extensions().items() if format in FORMATS}
    return [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in known and f.is_file() and
            not any(part.startswith(".") for part in f.relative_to(folder).parts)]


def read_image(path):
    """An image file as a pillow image, RGB, upright; the first of an animation. Raises ValueError for a bad file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                           # of odd metadata; a bomb is an error, see below
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.mode.startswith("I"):                                # 16 bits; convert() would clip them at 8
                    image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
                return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders of damaged files raise anything
        reason = " ".join(str(error).split()).replace(str(path), "it") or type(error).__name__
        raise ValueError(f"{str(path)!r} ({reason})") from None
