"""
What can be known of a GPU without one: that a step never waits for it, how many kernels the drift
launches, that it compiles without a break, and that bf16 keeps the gradient's direction.

The device "meta" stands in: its tensors have shapes and no numbers, `.item()` raises, and so does
an operation on tensors of two devices, like on a GPU.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import data
import drift
import features
import mae
import train
from conftest import needs
from model import DiT, DiTConfig

VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "alias"}
VIEWS |= {"unsqueeze", "squeeze", "detach", "split", "split_with_sizes", "chunk", "diagonal"}
VIEWS |= {"unbind", "as_strided", "lift_fresh", "unfold", "empty", "new_empty", "empty_like"}


class Launches(TorchDispatchMode):
    """Counts operations for which a GPU launches a kernel; refuses copies between devices."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        result = f(*args, **(kwargs or {}))
        tensors = [t for t in [*args, result] if isinstance(t, torch.Tensor)]
        assert len({t.device.type for t in tensors}) <= 1, f"{f} copies between devices"
        self.count += f.overloadpacket.__name__ not in VIEWS
        return result


@pytest.fixture
def gpu(monkeypatch):
    """The stand-in, with generators and autocast that it does not have."""

    class Generator:
        def __init__(self, device="cpu"):
            self.device = torch.device(device)

        def manual_seed(self, seed):
            return self

    def without_generator(draw):
        def drawn(*args, generator=None, device="cpu", **kwargs):
            if generator is not None:
                assert generator.device.type == torch.device(device).type
            return draw(*args, device=device, **kwargs)

        return drawn

    for name in ("rand", "randn", "randint", "randperm"):
        monkeypatch.setattr(torch, name, without_generator(getattr(torch, name)))
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    return torch.device("meta")


def small_encoder(size=16, width=8):
    """All the features of the CIFAR-10 preset's encoder, in a few channels; its own width is 32."""
    encode = features.Encoder("pixels", 3, size, pools=[2, 4])
    net = mae.MAE(3, size, width, max(1, size // 16), (2, 2, 2, 2))
    del net.bridge, net.ups, net.out, net.head
    encode.names, encode.nets = ["mae"], torch.nn.ModuleList([net])
    return encode.requires_grad_(False).eval()


def small_plan(*flags):
    common = ["--dataset", "cifar10-16", "--device", "cpu", "--labels", "4", "--n_gen", "16"]
    return train.parse([*common, "--n_pos", "4", *flags])[0]


def step_gradient(step, args, sampler, net, forward, encode, size):
    """That of four labels at once, to the parameters of net."""
    batch = train.draw_batch(step, args, sampler, net, slice(0, 4))
    train.gradient(batch, args, forward, encode, 4, size)


def photographs():
    """200 of CIFAR-10 as uint8 [200, 3, 16, 16], and their labels."""
    grid = Image.open(Path(data.__file__).with_name("assets") / "cifar10.png")  # a class a row
    grid = torch.from_numpy(np.array(grid)).view(10, 32, 20, 32, 3)
    images = grid.permute(0, 2, 4, 1, 3).reshape(200, 3, 32, 32)
    return data.resize(images, 16), torch.arange(10).repeat_interleave(20)


def small_world():
    """A generator that gives more than zeros, and a sampler."""
    net = DiT(DiTConfig.named("tiny", input_size=16, patch_size=4))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return net, data.Sampler(*photographs(), "cpu", flip=True)


@pytest.mark.parametrize("dataset", ["digits", "cifar10-16"])
@pytest.mark.parametrize("micro_batch", ["64", "32"])
def test_a_step_asks_the_gpu_for_nothing(gpu, monkeypatch, dataset, micro_batch):
    """No copy, no wait; the drift of 63 features at 3 taus: at most 800 launches, 2 reductions."""
    args = small_plan("--dataset", dataset, "--size", "16", "--micro_batch", micro_batch)
    net, sampler = small_world()
    encode = small_encoder()
    if dataset == "digits":
        encode.names, encode.nets = [], torch.nn.ModuleList()
    for name in ("images", "labels", "order", "count", "start"):
        setattr(sampler, name, getattr(sampler, name).to(gpu))
    sampler.home = sampler.device = gpu
    net, encode = net.to(gpu), encode.to(gpu)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    counts, reductions = [], []
    features_drift = drift.features_drift

    def counted(*args):
        with Launches() as launches:
            result = features_drift(*args)
        counts.append((launches.count, len(args[0])))
        return result

    monkeypatch.setattr(drift, "features_drift", counted)
    monkeypatch.setattr(drift, "mean_over_ranks", lambda t: reductions.append(1) or t)
    with Launches():
        step_gradient(0, args, sampler, net, net, encode, int(micro_batch))
        averages = [p.detach().clone() for p in net.parameters()]
        args.device = torch.device("cuda")
        monkeypatch.setattr(optimizer, "step", lambda: None)
        norm, _ = train.update(0, args, list(net.parameters()), averages, [optimizer], False)
        train.count_skipped(torch.zeros(3, device=gpu), norm)
    [(launched, names)] = counts
    print(f"\n{dataset}: {launched} launches of the drift, {names} features", end="")
    assert launched <= 800 and len(reductions) == 2 and names == (63 if "cifar" in dataset else 3)
    with pytest.raises(RuntimeError):
        norm.item()  # the stand-in would have noticed


@pytest.mark.skipif(sys.platform == "win32", reason="needs a compiler")
def test_everything_compiles_once_without_a_break(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    args = small_plan("--micro_batch", "32", "--n_unc", "3")
    net, sampler = small_world()
    whole = {"backend": counter, "fullgraph": True}
    forward = torch.compile(net, dynamic=False, **whole)
    encode = torch.compile(small_encoder(), dynamic=False, **whole)
    compiled = torch.compile(drift.field_weights, dynamic=True, **whole)
    monkeypatch.setattr(drift, "field_weights", compiled)
    train.real_drift(args, slice(0, 4), sampler, encode, 32)
    frames = []
    for step in range(3):
        step_gradient(step, args, sampler, net, forward, encode, 32)
        frames.append(counter.frame_count)
    assert frames[0] > 3 and frames[0] == frames[1] == frames[2], frames
    torch._dynamo.reset()


def whole_gradient(args, net, sampler, encode):
    net.zero_grad()
    step_gradient(0, args, sampler, net, net, encode, 64)
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def test_bf16_keeps_the_direction_of_the_gradient(monkeypatch):
    """Generator under autocast and encoder in bf16, as on a GPU, against float32 throughout."""
    args = small_plan()
    net, sampler = small_world()
    encode = small_encoder(width=32)
    exact = whole_gradient(args, net, sampler, encode)
    encode.nets.to(torch.bfloat16)

    def generate(forward, part):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*part).to(part[0].dtype)

    monkeypatch.setattr(train, "generate", generate)
    images = torch.rand(2, 3, 16, 16)
    kinds = {
        name.split(".")[0]: f.dtype for name, f in encode(images).items() if "norm" not in name
    }
    assert kinds["mae"] == torch.bfloat16 and kinds["global"] == torch.float32
    rounded = whole_gradient(args, net, sampler, encode)
    print(f"\ncosine of bf16 and float32: {cosine(exact, rounded):.4f}", end="")
    assert cosine(exact, rounded) > 0.95


def test_features_kept_in_bf16_keep_the_direction():
    """Only what the drift is given is rounded: the gradient with respect to images hardly turns."""
    torch.manual_seed(0)
    encode = small_encoder()
    pos, x = data.to_float(photographs()[0][:40]).chunk(2)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        images = x.clone().requires_grad_()
        fx = {k: f.to(dtype) for k, f in encode(images).items()}
        fp = {k: f.to(dtype) for k, f in encode(pos).items()}
        fu = {k: f[:0] for k, f in fp.items()}
        drift.features_loss(fx, fp, fu, torch.ones(2), iters=2)[0].backward()
        grads.append(images.grad.flatten())
    print(f"\ncosine with features in bf16: {cosine(*grads):.5f}", end="")
    assert cosine(*grads) > 0.999


def first_gradients(encode):
    """Norms of the gradient at zero images, as of a new generator, and at noise."""
    norms = []
    for x in (torch.zeros(8, 3, 16, 16), torch.randn(8, 3, 16, 16)):
        x.requires_grad_()
        real = encode(data.to_float(photographs()[0][:8]))
        none = {name: f[:0] for name, f in real.items()}
        drift.features_loss(encode(x), real, none, torch.ones(2), iters=2)[0].backward()
        norms.append(x.grad.norm().item())
    return norms


def test_the_first_gradient_is_moderate():
    """The first image is zero everywhere, where a norm of the encoder divides by nearly nothing."""
    wide = small_encoder()
    net = mae.MAE(3, 16, 64, 1, (3, 4, 6, 3))
    del net.bridge, net.ups, net.out, net.head
    wide.nets = torch.nn.ModuleList([net.requires_grad_(False)])
    for encode in (features.Encoder("pixels", 3, 16, [2, 4]), small_encoder(), wide):
        zero, noise = first_gradients(encode)
        assert 0 <= zero < 1000 * noise, (zero, noise)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "convnextv2_atto"])
def test_the_first_gradient_through_timm_is_finite(name):
    """ConvNeXt's, whose every norm is over the channels of one location, is large: some 1e7. It is
    clipped to 2 as any other, so it must be finite, and far from the end of float32 and bf16."""
    needs("timm")
    encode = features.Encoder("pixels", 3, 16)
    net = features.Timm(name, 64, pretrained=False).eval().requires_grad_(False)
    encode.names, encode.nets = [name], torch.nn.ModuleList([net])
    zero, noise = first_gradients(encode)
    print(f"\n{name}: norm of the gradient at zero images {zero:.1e}, at noise {noise:.1e}", end="")
    assert 0 < zero < 1e12


def test_where_found_inf_is_ignored_the_flag_is_read():
    args = SimpleNamespace(device=torch.device("mps"), lr=1.0, muon=0.0, warmup=0, decay=0)
    args.steps, args.ema = 9, 0.5
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], 1.0)
    for grad, expected in ((float("nan"), 1.0), (0.1, 0.9)):
        p.grad = torch.full((3,), grad)
        train.update(0, args, [p], [torch.ones(3)], [optimizer], False)
        assert p.tolist() == pytest.approx([expected] * 3)


def test_every_process_touches_its_own_gpu_first(monkeypatch):
    seen = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(f"set {device}"))
    monkeypatch.setattr(torch, "zeros", lambda *args, device: seen.append(f"zeros {device}"))
    assert data.device("cuda") == torch.device("cuda", 3)
    assert seen == ["set cuda:3", "zeros cuda:3"]


def test_data_that_do_not_fit_the_gpu_are_pinned(monkeypatch, gpu):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.shape) or t)
    _, sampler = small_world()
    sampler.device = gpu
    pos, unc = sampler.draw(torch.tensor([1, 2]), 5, 3, torch.Generator("cpu"))
    assert pos.device == gpu and pos.shape == (2, 5, 3, 16, 16) and unc.shape[1] == 3
    assert pinned == [(2, 8, 3, 16, 16), (2, 8)] and sampler.images.device.type == "cpu"


def test_parts_are_as_equal_as_can_be():
    cases = ((1000, 640), (640, 640), (200, 160), (160, 160), (7, 7), (300, 214), (0, 1))
    for most, size in cases:
        assert train.part_size(640, most) == size
    assert train.part_size(257, 128) == 86  # 86, 86 and 85


SHARED = """
import sys, torch
import data, fid, train

class Inception:
    protocol, original = "inception-stub", False

    def __init__(self, device):
        pass

    def __call__(self, images):
        return images.flatten(1)[:, ::7].float(), None

fid.Inception, train.N_EVAL, train.N_FID = Inception, 1010, 1300
train.main(sys.argv[1:])
"""


def test_ranks_share_evaluation_and_fid(tmp_path):
    """Two gloo ranks print the scores and the FID of one."""
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    plan = ["--device", "cpu", "--steps", "4", "--fid_every", "4", "--ema", "0.5", "--n_pos", "8"]
    plan += ["--n_gen", "8", "--data_dir", str(tmp_path)]
    printed = []
    here = str(Path(data.__file__).parent)
    for ranks in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *launch, str(script), *plan, "--out", str(tmp_path / "a.pt")]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": here}
        job = subprocess.run(command, cwd=here, capture_output=True, text=True, env=env)
        assert job.returncode == 0, job.stderr
        lines = [line for line in job.stdout.splitlines() if "fd " in line or "FID" in line]
        assert len(lines) == 3 and "1010 at alpha 1" in lines[0] and "FID-1300" in lines[2]
        printed.append(lines)
    assert printed[0] == printed[1]


@pytest.mark.parametrize(
    "device, size, width, patch", [("cpu", 32, 32, 2), ("cuda", 32, 64, 1), ("cuda", 64, 64, 2)]
)
def test_a_gpu_gets_a_larger_encoder(monkeypatch, tmp_path, device, size, width, patch):
    class Told(Exception):
        pass

    def train_mae(path, sampler, num_classes, width=32, patch=2, **kwargs):
        raise Told(width, patch)

    monkeypatch.setattr(mae, "train_mae", train_mae)
    args = small_plan("--encoder", "mae", "--size", str(size), "--data_dir", str(tmp_path))
    images = torch.zeros(1, 1, 3, size, size)
    sampler = SimpleNamespace(images=images, device=torch.device(device))
    with pytest.raises(Told) as told:
        train.build_encoder(args, sampler, 10)
    assert told.value.args == (width, patch)
