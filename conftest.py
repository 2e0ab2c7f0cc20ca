"""What the tests share: the two optional packages' set-up, small data sets and checkpoints."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import DiT, DiTConfig

HERE = Path(__file__).parent
ASSETS = HERE / "assets"


@pytest.fixture(autouse=True)
def _as_it_was():
    """Equal random numbers for a test wherever it runs, and one thread: what is tested is small."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def needs(package):
    """Skips the test where an optional package is missing.

    A torchvision of another build of torch stops at two operators that nothing here uses.
    """
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"pip install {package}")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        needs.library = torch.library.Library("torchvision", "DEF")  # they live as long as this
        needs.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        needs.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def python(*command, **kwargs):
    """A script in a process of its own, one thread: its exit status, stdout and stderr."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, *map(str, command)]
    job = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, **kwargs)
    return job.returncode, job.stdout, job.stderr


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def write_folder(root, n=9):
    """Two classes, cats and dogs, of n red or blue images."""
    for name, color in (("cats", (255, 0, 0)), ("dogs", (0, 0, 255))):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (40 + i, 30), color).save(root / name / f"{i}.png")
    return root


def photographs():
    """200 of CIFAR-10's, uint8 [200, 3, 32, 32], 20 of each class, one class after the other."""
    grid = torch.from_numpy(np.array(Image.open(ASSETS / "cifar10.png")))  # a class a row
    return grid.view(10, 32, 20, 32, 3).permute(0, 2, 4, 1, 3).reshape(200, 3, 32, 32)


def tiny_generator():
    """Of 8 x 8 grey images; with random weights everywhere, as adaLN-zero would hide mistakes."""
    net = DiT(DiTConfig.named("tiny", input_size=8, in_channels=1, patch_size=4))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


def save_generator(net, path, classes):
    state = dict(model=net.state_dict(), ema=net.state_dict(), config=asdict(net.config))
    torch.save(state | dict(args={}, classes=classes, step=0), path)
    return path
