"""FID, Inception score, precision and recall, by torch-fidelity; and train.py's scores, by pixels.

$ pip install torch-fidelity
$ python fid.py out.pt cifar10 --n 10000  # a generator against a data set
$ python fid.py samples/ cifar10:test     # images against the test set

Only FIDs of one network and equal numbers of images compare. Below 10,000 it is called FID-n."""

import argparse
import sys
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Subset

import data
import features
import model


def gaussian(x):
    """Mean [C] and covariance [C, C] of x [N, C], in float64."""
    x = x.cpu().double()  # mps has no float64
    return x.mean(0), x.T.cov()


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), also of singular ones."""
    val, vec = torch.linalg.eigh(cov_a)
    root = vec * val.clamp(min=0).sqrt() @ vec.T  # cov_a^(1/2)
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * mixed).item()


def closest(x, y):
    """Which of y [M, C] is nearest to each x [N, C]."""
    return torch.cat([torch.cdist(part, y).argmin(1) for part in x.split(256)])


def scores(images, labels, real, real_labels):
    """Compares images [n, C, H, W] in [-1, 1] with real ones, by pixels: fd, Frechet distance; acc,
    share whose nearest real image has their label; std, deviation of a pixel within a class."""
    C, size = images.shape[1:3]
    k = min(k for k in range(1, size + 1) if size % k == 0 and C * (size // k) ** 2 <= 1024)
    a, b = (F.avg_pool2d(x, k).flatten(1) for x in (images, real))  # at most 1,024 numbers
    stds = [images[labels == label].std(0, correction=0).mean() for label in labels.unique()]
    fd = frechet_distance(*gaussian(a), *gaussian(b))
    acc = (real_labels[closest(a, b)] == labels).float().mean().item()
    return dict(fd=fd, acc=acc, std=torch.stack(stds).mean().item())


def copies(images, real):
    """Share of images [n, C, H, W] that copy a real one: no pixel differs by 1/16 or more."""
    gap = images - real[closest(images.flatten(1), real.flatten(1))]
    return (gap.flatten(1).abs().amax(1) < 1 / 16).float().mean().item()


def load_set(name, args, n=None, size=None):
    """Images uint8 [N, 3, H, W] of a checkpoint (--n), or n of a data set, folder or .npz."""
    if name.endswith((".pt", ".pth")):
        net = model.load(name)[0].eval().to(args.device)
        label = torch.arange(args.n, device=args.device) % net.config.num_classes
        g = torch.Generator().manual_seed(0)
        images = [net.generate(part, args.cfg, g).cpu() for part in label.split(250)]
        return data.to_uint8(torch.cat(images)).expand(-1, 3, -1, -1)
    name, split = name.removesuffix(":test"), "test" if name.endswith(":test") else "train"
    if Path(name).is_dir():
        first = data.folder_files(Path(name))[0][0]
        size, name = size or min(data.read_image(first).size), f"folder:{name}"
    elif name.endswith(".npz"):
        name = f"npz:{name.removeprefix('npz:')}"
    images = data.load(name, args.data_dir, size, split)[0]
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[some[:n]].expand(-1, 3, -1, -1)  # a folder is sorted by class


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("sets", nargs=2, help="checkpoint, data set or NAME:test, folder, or .npz")
    p.add_argument("--n", type=int, default=50000, help="images of the first set alone")
    p.add_argument("--cfg", type=float, default=1.0, help="guidance of a generator")
    p.add_argument("--network", default="inception-v3-compat", help="or dinov2-vit-s-14, ...")
    p.add_argument("--weights", help="a file of its weights, instead of a download")
    p.add_argument("--data_dir", default="data")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    how = dict(feature_extractor=args.network, feature_extractor_weights_path=args.weights)
    how |= dict(cuda="cuda" in args.device, save_cpu_ram=True, cache_root=args.data_dir)
    try:
        args.device = model.usable(args.device)
        from torch_fidelity import calculate_metrics
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torch_fidelity.utils import FEATURE_EXTRACTORS_REGISTRY

        class Folded(FeatureExtractorInceptionV3):  # equal features in half the time of a CPU
            def eval(self):
                return features.fold(super().eval()).to(memory_format=torch.channels_last)

        FEATURE_EXTRACTORS_REGISTRY["inception-v3-compat"] = Folded
        a = load_set(args.sets[0], args, args.n)
        b = load_set(args.sets[1], args, size=a.shape[-1])
        how |= dict(input1=Subset(a, range(len(a))), input2=Subset(b, range(len(b))))
        how["input2_cache_name"] = f"{len(b)}-{zlib.crc32(b.numpy().tobytes()):08x}"
        found = calculate_metrics(fid=True, isc=True, prc=True, verbose=False, **how)
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # of torchvision: the last
        sys.exit(f"fid.py: error: {' '.join(str(error).split())}")
    few = f"FID-{len(a)}: " if len(a) < 10000 else ""
    print(f"{few}{len(a):,} images against {args.sets[1]}, at {a.shape[-1]} pixels")
    for name, value in found.items():
        print(f"{name:32s} {value:.4g}")


if __name__ == "__main__":
    main()
