"""The settings of a run: what is typed, else those of a resumed checkpoint, else the preset of the
data set, else the default. For a setting of your own, add a line to Settings."""

import inspect
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path

import torch

import drift
from model import SIZES, load


@dataclass
class Settings:
    dataset: str = "digits"  # mnist fashion cifar10 folder:PATH npz:FILE latents:PATH, see data.py
    data_dir: str = "data"  # where data sets are, or are downloaded to
    size: int = 0  # image size in pixels; 0: the data set's own
    flip: bool = False  # mirror half of the images
    unconditional: bool = False  # no labels: one group, no guidance
    encoder: list = ("pixels",)  # spaces of the drift, see features.py; auto: by data and machine

    init: str = ""  # checkpoint of a generator to start from, with its --model and --patch
    model: str = "tiny"  # size of the generator: tiny S B L
    patch: int = 4  # patch size of the generator, in pixels; 0: size / 16
    noise_image: bool = True  # false: the style codes alone make samples differ

    labels: int = 10  # labels in a step; a preset's is rounded up to a multiple of the ranks
    n_gen: int = 32  # samples per label
    n_pos: int = 32  # real images per label
    n_unc: int = 8  # real images of any class per label, for guidance
    micro_batch: int = 0  # images at a time, to save memory; 0: all

    taus: list = drift.TAUS  # kernel widths, in units of the mean distance
    iters: int = 2  # how often the softmaxes are averaged; Algorithm 2: 1
    floor: float = 0.0  # least product of the softmaxes; official: 1e-6
    alpha_max: float = 4.0  # guidance alpha is drawn from 1 to this; n_unc 0: 1
    alpha_k: float = 3.0  # density of alpha: alpha^-k
    alpha_one: float = 0.5  # share of labels without guidance

    steps: int = 600  # in all, resumed ones included
    stop_after: int = 0  # end at this step; the rates still follow --steps
    lr: float = 3e-3  # learning rate of AdamW
    muon: float = 0.0  # rate of Muon, for the matrices of the blocks; 0: AdamW
    warmup: int = 50  # steps to the full rates
    decay: float = 0.4  # last share of the steps, over which the rates fall to 0
    wd: float = 0.01  # weight decay, of all parameters
    ema: float = 0.99  # decay of the average of the weights; 0: the last weights

    seed: int = 0  # of all random numbers
    compile: bool = None  # by torch.compile; if not given: on CUDA
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu cuda mps
    log_every: int = 100  # steps to a line of the log
    eval_every: int = 1000  # steps to scores, samples and a checkpoint
    out: str = "out.pt"  # checkpoint; log and samples are named after it
    resume: str = ""  # checkpoint to go on from; auto: --out, if it is there


LEAST = dict(labels=1, n_gen=2, n_pos=1, iters=1, alpha_max=1, steps=1, log_every=1, eval_every=1)
LEAST["taus"] = 1e-6
MOST = dict(ema=1, alpha_one=1, decay=1, seed=2**63)  # other numbers: 0 to infinity

MNIST = dict(encoder=["pixels", "pool:2", "pool:4", "window:8"], patch=7, n_pos=128, n_unc=32)
MNIST |= dict(muon=0.02, steps=1600)
PHOTOS = dict(encoder=["auto"], patch=0, noise_image=False, labels=4, n_gen=80, n_pos=160, n_unc=0)
PHOTOS |= dict(muon=0.02, ema=0.0, steps=1300, log_every=25, eval_every=100)  # 2 hours, 2 cores
# Not run yet; the 1,500 steps of cifar10 are planned for nine minutes of an H100
PHOTOS_CUDA = dict(model="S", labels=5, n_gen=128, n_pos=256, lr=1e-3, warmup=100)
PHOTOS_CUDA |= dict(steps=5000, ema=0.99, eval_every=500)
PRESETS = {  # data set: (what differs from the defaults, what differs further on CUDA)
    "digits": (dict(n_pos=128, muon=0.02, alpha_one=0.85, log_every=50, eval_every=300), {}),
    "mnist": (MNIST, {}),
    "fashion": (MNIST, {}),
    "cifar10": (PHOTOS | dict(flip=True), PHOTOS_CUDA | dict(steps=1500)),
    "folder": (PHOTOS | dict(size=32, flip=True), PHOTOS_CUDA | dict(size=64)),
    "npz": (PHOTOS, PHOTOS_CUDA),
    "latents": (dict(encoder=["mae"], patch=2, steps=5000, ema=0.999), {}),
}
ABOUT_AUTO = "on CIFAR-10 MobileNetV2 (pip install timm) has half the FID of mae"


def parse(argv=None, description=""):
    """-> Settings, what was typed of them, the checkpoint of --resume or --init. ValueError."""
    text = f"{description}\n{inspect.getsource(Settings)}"
    parser = ArgumentParser(description=text, formatter_class=RawDescriptionHelpFormatter)
    for f in fields(Settings):
        how = dict(type=f.type)
        if f.type is bool:
            how = dict(action=BooleanOptionalAction)
        elif f.type is list:
            how = dict(type=type(f.default[0]), nargs="+")
        parser.add_argument(f"--{f.name}", default=SUPPRESS, help=SUPPRESS, **how)
    typed = vars(parser.parse_args(argv))

    preset, on_cuda = PRESETS.get(typed.get("dataset", "digits").partition(":")[0], ({}, {}))
    if typed.get("device", Settings.device).startswith("cuda"):
        preset = preset | on_cuda
    path, source = typed.get("resume", ""), None
    if path == "auto":
        path = typed.get("out", Settings.out)
        path = path if Path(path).exists() else ""
    if path:
        source = load(path, weights="model")[1]
        preset = {name: value for name, value in source["args"].items() if hasattr(Settings, name)}
        preset |= dict(out=path, stop_after=0, device=Settings.device)
    elif "init" in typed:
        source = load(typed["init"])[1]
        preset = preset | dict(size=source["config"]["input_size"])
    args = Settings(**preset | typed | dict(resume=path))
    if args.model not in SIZES:
        raise ValueError(f"no generator {args.model}: there are {', '.join(SIZES)}")
    for name, value in vars(args).items():
        number = min(value) if name == "taus" else value
        least, most = LEAST.get(name, 0), MOST.get(name, float("inf"))
        if isinstance(number, int | float) and not least <= number <= most:
            raise ValueError(f"--{name} {value} must be {least} to {most}")
    return args, typed, source


def adapt(args, typed, shape, classes, world):
    """The settings for images of shape (C, H, W), this number of classes, and `world` ranks."""
    args, size = replace(args), shape[-1]
    if classes == 1:  # the samples of all labels become one large group, on every rank
        if not args.resume:
            args.n_gen *= 1 if "n_gen" in typed else args.labels
            args.n_pos *= 1 if "n_pos" in typed else args.labels
        args.labels, args.n_unc = world, 0
    if args.labels % world and "labels" in typed:
        raise ValueError(f"--labels {args.labels} is no multiple of {world} ranks")
    args.labels += -args.labels % world  # rounded up
    if not args.n_unc:
        args.alpha_max = 1.0  # no unconditional images, no guidance
    if not args.patch:
        args.patch = min(k for k in range(1, size + 1) if size % k == 0 and size <= 16 * k)
    if "auto" in args.encoder:
        use_timm = shape[0] == 3 and find_spec("timm")
        pools = [f"pool:{k}" for k in (2, 4) if size % k == 0]
        network = f"timm:mobilenetv2_100@{max(96, size)}" if use_timm else "mae"
        args.encoder = ["pixels", *pools, network, *(n for n in args.encoder if n != "auto")]
    return args
