"""What the tests share: seeds, optional packages, processes, small data sets and checkpoints."""

import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from imagenet import convert
from imagenet.convnext import ConvNeXtV2
from mae import MAE
from model import SIZES, DiT, DiTConfig

HERE = Path(__file__).parent
ASSETS = HERE / "assets"
# The authors' names of ConvNeXt's modules and parameters, replaced by timm's one after the other
TIMM = {r"downsample_layers_0\.layers_": "stem.", r"stages_(\d)\.layers_": r"stages.\1.blocks."}
TIMM |= {r"downsample_layers_(\d)\.layers_": r"stages.\1.downsample.", "^norm": "head.norm"}
TIMM |= {"dwconv": "conv_dw", "pwconv": "mlp.fc", "grn": "mlp.grn", "beta": "bias"}
TIMM |= {"kernel|scale|gamma": "weight"}


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """Every test starts with the same seeds, on one thread, and scores few samples."""
    monkeypatch.setattr(train, "N_EVAL", 50)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def needs(package):
    """An optional package; the test is skipped where it is missing.

    A torchvision of another build of torch stops at two operators that nothing here uses.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        needs.library = torch.library.Library("torchvision", "DEF")  # they live as long as this
        needs.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        needs.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip(package)


def start(*command, **kwargs):
    """Starts a script in a process of its own, of one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, text=True, **kwargs)


def refusal(main, *args):
    """The one line with which a script refuses its arguments."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def write_folder(root, n=9):
    """Two classes, cats and dogs, of n red or blue images."""
    for name, color in (("cats", (255, 0, 0)), ("dogs", (0, 0, 255))):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (40 + i, 30), color).save(root / name / f"{i}.png")
    return root


def tiny_generator(std=0.1, **shape):
    """With random weights everywhere, as adaLN-zero would hide mistakes."""
    shape = dict(input_size=8, in_channels=1, patch_size=4) | shape
    net = DiT(DiTConfig(**SIZES["tiny"], **shape))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=std)
    return net


def save_generator(net, path, classes):
    state = dict(model=net.state_dict(), ema=net.state_dict(), config=asdict(net.config))
    torch.save(state | dict(args={}, classes=classes, step=0), path)
    return path


def golden(name, prefix=""):
    """The arrays of assets/golden_NAME.npz whose names begin with prefix, which is removed."""
    file = np.load(ASSETS / f"golden_{name}.npz")
    return {key.removeprefix(prefix): file[key] for key in file.files if key.startswith(prefix)}


def our_mae():
    """An MAE with the stored weights; its decoder, of which none are stored, stays random."""
    net, arrays = MAE(channels=3, size=32, width=8, num_classes=11), golden("mae", "A/params/")
    state = net.state_dict()
    for name in state:
        [key], order = convert.mae_key(name)
        if key in arrays:
            state[name] = torch.from_numpy(arrays[key]).permute(order)
    net.load_state_dict(state)
    return net


def our_convnext():
    """A small ConvNeXtV2 with the stored weights."""
    from timm.models.convnext import ConvNeXt

    net, state = ConvNeXtV2.__new__(ConvNeXtV2), {}
    torch.nn.Module.__init__(net)
    net.size = 224
    shape = dict(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64), use_grn=True, ls_init_value=None)
    net.net = ConvNeXt(**shape, num_classes=0)
    for name, array in golden("convnext", "params/").items():
        is_matrix, name = name.endswith("kernel"), name.replace("/", ".")
        for theirs, ours in TIMM.items():
            name = re.sub(theirs, ours, name)
        order = (3, 2, 0, 1) if array.ndim == 4 else (1, 0)
        array = torch.from_numpy(array)
        state[name] = array.permute(order) if is_matrix else array.flatten()
    net.net.load_state_dict(state)
    return net.eval()
