"""Data sets as arrays, the real images of a step, and image files.

digits        1,797 handwritten digits of 8x8 pixels, in assets/
mnist         60,000 digits of 28x28, downloaded to DIR/MNIST/raw
fashion       60,000 garments of 28x28, downloaded to DIR/FashionMNIST/raw
cifar10       50,000 photographs of 32x32, downloaded to DIR/cifar-10-batches-py
folder:PATH   one sub-folder per class, of any images that pillow opens; or images alone
npz:FILE      arr_0, uint8 [N, H, W, C] or float [N, C, H, W] from -1 to 1, and labels or arr_1,
              integers [N], if any; or a .npy of images
latents:DIR   written by imagenet/encode.py
"""

import gzip
import hashlib
import os
import pickle
import shutil
import sys
import tempfile
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin

NOT_READ = ["BUFR", "GRIB", "HDF5", "WMF", "MPEG", "EPS"]  # pillow knows little but their names
KINDS = Image.registered_extensions().items()
SUFFIXES = {end for end, kind in KINDS if kind in Image.OPEN and kind not in NOT_READ}
if hasattr(sys.stdout, "reconfigure"):  # names of classes that a terminal cannot show
    sys.stdout.reconfigure(errors="replace")
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30  # some tools add long texts

MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
GARMENTS = "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot"


def load(name, data_dir="data", size=None, split="train"):
    """-> images uint8 or float [N, C, H, W], labels int64 [N], names. Raises ValueError, OSError.
    size None: the set's own, 64 of a folder; split: train, or test of mnist, fashion, cifar10."""
    data_dir, path, names = Path(data_dir), Path(name.partition(":")[2]), []
    if name == "digits":
        file = np.load(Path(__file__).with_name("assets") / "digits.npz")
        images = np.round(file["images"][:, None] * (255 / 16)).astype(np.uint8)
        labels = file["labels"]
    elif name == "mnist":
        images, labels = load_idx(data_dir / "MNIST/raw", MNIST, split)
    elif name == "fashion":
        images, labels = load_idx(data_dir / "FashionMNIST/raw", FASHION, split)
        names = GARMENTS.split()
    elif name == "cifar10":
        images, labels, names = load_cifar10(data_dir, split)
    elif name.startswith("folder:") and name != "folder:":
        images, labels, names = load_folder(path, data_dir, size or 64)
    elif name.startswith("npz:"):
        images, labels = load_npz(path)
    elif name.startswith("latents:"):
        with one_line(f"cannot read {path}"):
            images = np.load(path / "latents.npy", mmap_mode="r")
            labels = np.load(path / "labels.npy")
            if (path / "classes.txt").exists():
                names = (path / "classes.txt").read_text().splitlines()
    else:
        raise ValueError(f"no data set {name}: the top of data.py lists them")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
        raise ValueError(f"{name}: {labels.dtype} labels {labels.shape}, not {len(images)} ints")
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"{name}: images {images.shape} are not square")
    if images.dtype.kind == "f":
        for i in range(0, len(images), 1 + images.nbytes // 2**30):  # a gigabyte of a larger set
            if not np.abs(images[i]).max() <= 100:
                raise ValueError(f"{name}: image {i} has NaN or values above 100")
        if images[:1000].min() >= 0:
            print(f"{name}: no value is below 0. Is it 0 to 1? Black is -1 here, white is 1")
    numbers, labels = np.unique(labels, return_inverse=True)  # they may begin anywhere
    names = [names[n] if 0 <= n < len(names) else str(n) for n in numbers]
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    images, labels = torch.from_numpy(images), torch.from_numpy(labels)
    if size and size != images.shape[-1]:
        if images.is_floating_point():
            raise ValueError(f"{name} has floats, which are not resized to {size}")
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return images, labels, names


def check_writable(path):
    """Raises now, not after hours, if a checkpoint cannot be written here. ValueError, OSError."""
    if path.suffix != ".pt":
        raise ValueError(f"--out {path} must end in .pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()


@contextmanager
def one_line(what, advice="if it is damaged, delete it"):
    try:
        yield
    except Exception as error:  # networks and damaged files raise errors of any kind
        raise ValueError(f"{what} ({error!r}): {advice}") from None


def download(url, path):
    print(f"downloading {url}", flush=True)
    with one_line(f"cannot download {url}", f"put it at {path} by hand"):
        content = urllib.request.urlopen(url, timeout=60).read()
        if content[:2] != b"\x1f\x8b":
            raise ValueError("a login page came, or another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def load_idx(folder, url, split):
    start, arrays = "train" if split == "train" else "t10k", []
    for file in (f"{start}-images-idx3-ubyte", f"{start}-labels-idx1-ubyte"):
        path, packed = folder / file, folder / f"{file}.gz"
        if not path.exists() and not packed.exists():
            download(url + packed.name, packed)
        with one_line(f"cannot read {path if path.exists() else packed}"):
            raw = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
            shape = np.frombuffer(raw, ">i4", raw[3], offset=4)  # after 0, 0, type, dimensions
            arrays.append(np.frombuffer(raw, np.uint8, offset=4 + shape.nbytes).reshape(shape))
    return arrays[0][:, None].copy(), arrays[1]


def load_cifar10(data_dir, split):
    folder, archive = data_dir / "cifar-10-batches-py", data_dir / "cifar-10-python.tar.gz"
    if not folder.exists() and not archive.exists():
        download(CIFAR10, archive)
    files = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    with one_line(f"cannot read {folder} or {archive}"):
        if not folder.exists():
            shutil.unpack_archive(archive, data_dir, filter="data")  # nothing outside of data_dir
        raw = [(folder / file).read_bytes() for file in [*files, "batches.meta"]]
        *batches, meta = [pickle.loads(part, encoding="bytes") for part in raw]
        images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([batch[b"labels"] for batch in batches])
        return images, labels, [name.decode() for name in meta[b"label_names"]]


def load_npz(path):
    with one_line(f"cannot read {path}"):
        file = np.load(path)
        arrays = {"arr_0": file} if isinstance(file, np.ndarray) else dict(file)
    if "arr_0" not in arrays:
        raise ValueError(f"{path} has {', '.join(arrays)}: call the images arr_0, labels labels")
    images, second = arrays.pop("arr_0"), arrays.get("arr_1", np.array(0.0))
    if "labels" not in arrays and second.dtype.kind in "iu" and second.shape == images.shape[:1]:
        arrays["labels"] = arrays.pop("arr_1")  # as np.savez(file, images, labels) names them
    labels = arrays.pop("labels", np.zeros(images.shape[:1], int))
    if arrays:
        print(f"{path}: not read: {', '.join(arrays)}")
    if images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels
    if images.dtype.kind != "f" or images.ndim != 4:
        what = f"{path}: arr_0 is {images.dtype} {images.shape}"
        raise ValueError(f"{what}, not uint8 [N, H, W, 1 or 3] or float [N, C, H, W]")
    return np.ascontiguousarray(images, np.float32), labels


def load_folder(root, data_dir, size):
    files, labels, names = folder_files(root)
    stats = [(str(f.absolute()), f.stat().st_mtime_ns, f.stat().st_size) for f in files]
    digest = hashlib.md5(repr(stats).encode()).hexdigest()[:12]  # other files, another cache
    cache = data_dir / f"{root.absolute().name}-{size}-{digest}.npy"
    if not cache.exists():
        print(f"reading {len(files):,} images of {root} into {cache}", flush=True)
        data_dir.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}.tmp")  # another run may read the same folder
        try:
            write_images(files, size, part)
            part.replace(cache)
        finally:
            part.unlink(missing_ok=True)
    return np.load(cache, mmap_mode="r"), labels, names


def write_images(files, size, path):
    """Image files, cut to squares, as a .npy of uint8 [N, 3, size, size]. ValueError, OSError."""
    shape = (len(files), 3, size, size)
    bad = []

    def read(file):
        try:
            image = ImageOps.fit(read_image(file, 2 * size), (size, size), Image.LANCZOS)
            return np.asarray(image).transpose(2, 0, 1).tobytes()
        except Exception as error:  # decoders of damaged files raise anything
            bad.append(f"{file} ({error})")
            return b""

    with path.open("wb") as out, ThreadPoolExecutor(4) as pool:  # pillow releases Python's lock
        header = dict(descr="|u1", fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(out, header)
        for image in pool.map(read, files):
            out.write(image)
    if bad:
        listed = path.with_suffix(".bad.txt")
        listed.write_text("\n".join(sorted(bad)))
        raise ValueError(f"{len(bad)} files do not open as images, see {listed}: {sorted(bad)[:3]}")


def folder_files(root):
    """Images below a folder, through links -> paths, labels, class names. Raises ValueError."""

    def hidden(path):  # as thumbnails of network drives are
        return any(part.startswith(("@", ".", "__")) for part in path.relative_to(root).parts)

    walk = os.walk(root, followlinks=True)
    found = sorted(Path(folder, file) for folder, _, files in walk for file in files)
    images = [f for f in found if f.suffix.lower() in SUFFIXES and f.is_file() and not hidden(f)]
    files = [f for f in images if f.parent != root] or images
    if not files:
        raise ValueError(f"there is no folder {root} with images")
    left_out = sorted(set(found).difference(files))
    if left_out:
        print(f"{root}: {len(left_out)} files are left out, such as {left_out[0]}", flush=True)
    folders = [f.relative_to(root).parts[0] if f.parent != root else root.name for f in files]
    names, labels = np.unique(folders, return_inverse=True)
    empty = [f for f in root.iterdir() if f.is_dir() and f.name not in names and not hidden(f)]
    if empty and files[0].parent != root:
        raise ValueError(f"{empty[0]} has no images, or may not be read")
    return files, labels, names.tolist()


def read_image(path, least=2**16):
    """An image file in RGB, upright, on white. A large JPEG may come smaller, not below `least`."""
    image = Image.open(path)
    image.draft("RGB", (least, least))
    image.load()
    with suppress(Exception):  # an image with odd tags is still an image
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") and image.format == "PNG":  # 16 bits
        grey = np.array(image)
        grey[grey == image.info.get("transparency", -1)] = 65535
        image = Image.fromarray((grey // 257).astype(np.uint8))
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError("more than 8 bits a channel: give an npz:FILE of floats instead")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


class Sampler:
    """Draws real images by label; images [N, C, H, W] or views [N, V, C, H, W], labels [N]."""

    def __init__(self, images, labels, device, flip=False):
        self.device = torch.device(device)
        self.flip = flip and images.ndim == 4  # latents hold their mirror images as views
        if self.device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            images = images.to(device)  # larger sets stay on the CPU
        self.images = images if images.ndim == 5 else images[:, None]  # of a single view
        self.labels = labels.to(device)
        self.count = labels.bincount().to(device)  # [classes]
        self.classes, self.most = len(self.count), int(self.count.max())
        self.order = labels.argsort(stable=True).to(device)  # the images, sorted by class
        self.start = self.count.cumsum(0) - self.count  # where a class begins in it

    def some(self, most):
        """Real images as they are, at most so many and a gigabyte, and their labels."""
        most = min(most, 2**28 // self.images[0, 0].numel())
        some = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))[:most]
        some = some.to(self.device)
        return self.fetch(some, torch.zeros_like(some)), self.labels[some]

    def draw_labels(self, n, g):
        """Labels [n]: shuffled passes over all classes."""
        lot = torch.rand(-(-n // self.classes), self.classes, generator=g, device=self.device)
        return lot.argsort(1).flatten()[:n]

    def draw(self, labels, n_pos, n_unc, g):
        """What to fetch() for labels [L]: index and view [L, P + U]. The first P are of the label,
        none twice unless its class has fewer than P images; the others are of any class."""
        L, rand = len(labels), dict(generator=g, device=self.device)
        lot = torch.rand(L, self.most, **rand)
        count = self.count[labels, None]  # [L, 1]
        missing = torch.arange(self.most, device=self.device) >= count
        some = lot.masked_fill(missing, -1).topk(min(n_pos, self.most)).indices  # without repeats
        some = some.gather(1, torch.arange(n_pos, device=self.device) % count)  # [L, P]
        pos = self.order[self.start[labels, None] + some]
        index = torch.cat([pos, torch.randint(len(self.images), (L, n_unc), **rand)], dim=1)
        return index, torch.rand(index.shape, **rand)

    def fetch(self, index, view):
        """Images in [-1, 1], [..., C, H, W], by index [...]; view [...], uniform in [0, 1), says
        which of their views, or whether mirrored; 0: as they are."""
        where, which = self.images.device, (view * self.images.shape[1]).long()
        images = to_float(self.images[index.to(where), which.to(where)].to(self.device))
        mirrored = (view >= 0.5)[..., None, None, None]
        return torch.where(mirrored, images.flip(-1), images) if self.flip else images


def to_float(images):
    """uint8 -> float in [-1, 1]; floats stay as they are."""
    floats = images.to(torch.get_default_dtype())
    return floats if images.is_floating_point() else floats / 127.5 - 1


def to_uint8(images):
    """[-1, 1] -> uint8, the inverse of to_float; what is outside is clamped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images, path, classes=1):
    """uint8 [n, C, H, W] as one PNG, up to 10 classes as columns; enlarged to about 56 pixels."""
    columns = min(len(images), 10 if classes == 1 else min(classes, 10))
    tiles = F.pad(images, (1, 1, 1, 1, 0, 0, 0, -len(images) % columns))
    grid = torch.cat([torch.cat([*row], dim=2) for row in tiles.split(columns)], dim=1)  # [C, H, W]
    image = Image.fromarray(grid.permute(1, 2, 0).squeeze(2).cpu().numpy())
    ImageOps.scale(image, max(1, round(56 / images.shape[-1])), Image.NEAREST).save(path)
