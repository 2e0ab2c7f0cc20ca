"""
What can be known of a GPU without one: that a step does not wait for it or copy to it, how many
kernels the drift launches, that all compiles without a break, that bf16 keeps the gradient's
direction, and that the drift is exact whatever precision is set.

The device "meta" stands in: its tensors have shapes and no numbers, and `.item()` raises, as does
an operation on tensors of two devices.
"""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import drift
import features
import mae
from conftest import photographs, relative
from model import DiT, DiTConfig


class Launches(TorchDispatchMode):
    """Counts operations for which a GPU launches a kernel: all but views."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += not op.is_view
        return op(*args, **(kwargs or {}))


def small_encoder(tmp_path, width=8):
    """All the features of the CIFAR-10 preset's encoder, in a few channels."""
    net = mae.MAE(3, 32, width, 2, (2, 2, 2, 2))
    torch.save(dict(config=net.config, model=net.state_dict()), tmp_path / "mae.pt")
    return features.Encoder(["pixels", "pool:2", "pool:4", str(tmp_path / "mae.pt")], 3, 32)


def step_loss(net, encode, real):
    """That of two labels of 8 samples and 8 real images."""
    device = real.device
    g = torch.Generator().manual_seed(0)
    noise, style = (t.to(device) for t in net.draw(16, g))
    label = torch.arange(16, device=device) % 10
    x = net(noise, style, label, torch.ones(16, device=device))
    with torch.no_grad():
        fp = encode(real)
    fu = {name: f[:4] for name, f in fp.items()}
    alpha = torch.full((2,), 1.5, device=device)
    return drift.features_loss(encode(x.float()), fp, fu, alpha, iters=2)[0]


def small_net():
    """A generator that gives more than zeros."""
    net = DiT(DiTConfig.named("tiny", patch_size=4))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return net


def test_a_step_asks_the_gpu_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # meta has none
    net, encode = small_net().to("meta"), small_encoder(tmp_path).to("meta")
    real = torch.empty(16, 3, 32, 32, device="meta")
    step_loss(net, encode, real).backward()
    fx = {name: f.detach().requires_grad_() for name, f in encode(real).items()}
    with Launches() as launches:
        loss, _ = drift.features_loss(fx, fx, fx, torch.ones(2, device="meta"), iters=2)
    shapes = {f.shape for f in fx.values()}
    print(f"\n{launches.count} launches of the drift, {len(fx)} features, {len(shapes)} shapes")
    assert len(fx) == 63 and launches.count <= 125 * len(shapes)
    with pytest.raises(RuntimeError):
        loss.item()  # the stand-in would have noticed


def test_everything_compiles_once_without_a_break(tmp_path):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    whole = dict(backend=counter, fullgraph=True)
    net, real = small_net(), data.to_float(photographs()[:16])
    forward = torch.compile(net, dynamic=False, **whole)
    forward.draw = net.draw
    encode = torch.compile(small_encoder(tmp_path), dynamic=False, **whole)
    frames = []
    for _ in range(2):
        step_loss(forward, encode, real).backward()
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] > 1
    x, y = torch.randn(2, 8, 5), torch.randn(2, 8, 5)
    loss, _ = torch.compile(drift.drift_loss, **whole)(x, y)
    torch.testing.assert_close(loss, drift.drift_loss(x, y)[0])
    torch._dynamo.reset()


def test_bf16_keeps_the_direction_of_the_gradient(tmp_path):
    """Generator under autocast and encoder in bf16, as on a GPU, against float32 throughout."""
    net, real, grads = small_net(), data.to_float(photographs()[:16]), []
    encode = small_encoder(tmp_path, width=32)
    for dtype in (torch.float32, torch.bfloat16):
        encode.nets.to(dtype)
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            step_loss(net, encode, real).backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    cosine = torch.nn.functional.cosine_similarity(*grads, dim=0).item()
    print(f"\ncosine of bf16 and float32: {cosine:.4f}", end="")
    assert cosine > 0.95


def low_precision_by_the_old_api():
    torch.set_float32_matmul_precision("medium")
    return lambda: torch.get_float32_matmul_precision() == "medium"


def low_precision_by_the_new_api():
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    backends[0].fp32_precision, backends[1].fp32_precision = "tf32", "bf16"
    return lambda: [b.fp32_precision for b in backends] == ["tf32", "bf16"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("api", [low_precision_by_the_old_api, low_precision_by_the_new_api])
def test_the_drift_is_exact_whatever_precision_is_set(api, compiled):
    if "new" in api.__name__ and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch 2.9 and later")
    x, y = torch.randn(2, 16, 64) + 30, torch.randn(2, 16, 64) + 30

    def gradient(loss=drift.drift_loss):
        leaf = x.clone().requires_grad_()
        loss(leaf, y)[0].backward()
        return leaf.grad

    exact = gradient()
    torch._dynamo.reset()
    try:
        as_set = api()
        loss = drift.drift_loss
        if compiled:
            loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            found = gradient(loss)
        assert as_set() and relative(found, exact) < 1e-5
    finally:
        torch.set_float32_matmul_precision("highest")
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            torch.backends.cuda.matmul.fp32_precision = "none"
            torch.backends.mkldnn.matmul.fp32_precision = "none"
