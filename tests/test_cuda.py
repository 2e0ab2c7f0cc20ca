"""What can be known of a GPU without one: that a step does not wait for it or copy to it, how many
kernels the drift launches, that all compiles without a break, that bf16 keeps the gradient's
direction, and that the drift is exact whatever precision is set.

The device "meta" stands in: its tensors have shapes and no numbers, and `.item()` raises, as does
an operation on tensors of two devices.
"""

from copy import deepcopy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import config
import data
import drift
import features
import mae
import train
from conftest import relative, tiny_generator


def small_encoder(tmp_path, width=8):
    """All the features of the CIFAR-10 preset's encoder, in a few channels."""
    net = mae.MAE(3, 32, width, 2, (2, 2, 2, 2))
    torch.save(dict(config=net.config, model=net.state_dict()), tmp_path / "mae.pt")
    return features.Encoder(["pixels", "pool:2", "pool:4", str(tmp_path / "mae.pt")], 3, 32)


def step_loss(net, encode, real):
    """That of two labels of 8 samples and 8 real images."""
    device = real.device
    noise, style = (t.to(device) for t in net.draw(16, torch.Generator()))
    label = torch.arange(16, device=device) % 10
    x = net(noise, style, label, torch.ones(16, device=device))
    with torch.no_grad():
        fp = encode(real)
    fu = {name: f[:4] for name, f in fp.items()}
    alpha = torch.full((2,), 1.5, device=device)
    return drift.features_loss(encode(x.float()), fp, fu, alpha, iters=2)[0]


def generator_and_images():
    """A generator that gives more than zeros, and 16 real images [16, 3, 32, 32]."""
    images, _, _ = data.load("digits", size=32)
    real = data.to_float(images[:16]).expand(-1, 3, -1, -1)
    return tiny_generator(std=0.05, input_size=32, in_channels=3), real


def test_a_step_of_the_trainer_waits_for_no_number(tmp_path):
    """Fake tensors have no numbers, and reading one raises: on a GPU the CPU would wait there."""
    args, _, _ = config.parse(["--device", "cpu", "--muon", "0.02", "--n_gen", "4"])
    images, labels, _ = data.load("digits", size=32)
    sampler = data.Sampler(images.expand(-1, 3, -1, -1), labels, "cpu", True)
    net, encode = tiny_generator(input_size=32, in_channels=3), small_encoder(tmp_path)
    ema, optimizers = deepcopy(net).requires_grad_(False), train.build_optimizers(net, args)
    with FakeTensorMode(allow_non_fake_inputs=True):
        g = torch.Generator()
        loss, stats = train.step_loss(net, encode, drift.field, sampler, args, g)
        norm = train.update(net, ema, optimizers, loss, args, 0)
        assert len(optimizers) == 2 and len(stats) == 63
        with pytest.raises(DataDependentOutputException):
            norm.isfinite().item()


def test_everything_compiles_once_without_a_break(tmp_path):
    """And the three equal blocks of the generator as one."""
    torch._dynamo.reset()
    blocks, parts = CompileCounter(), CompileCounter()
    (net, real), encode = generator_and_images(), small_encoder(tmp_path)
    net.compile(dynamic=False, fullgraph=True, backend=blocks)
    encode.compile(dynamic=False, fullgraph=True, backend=parts)
    frames = []
    for _ in range(2):
        step_loss(net, encode, real).backward()
        frames.append((blocks.frame_count, parts.frame_count))
    assert frames[0] == frames[1] == (1, 2)  # with and without gradient


def test_bf16_keeps_the_direction_of_the_gradient(tmp_path):
    """Generator under autocast and encoder in bf16, as on a GPU, against float32 throughout."""
    net, real = generator_and_images()
    encode, grads = small_encoder(tmp_path, width=32), []
    for dtype in (torch.float32, torch.bfloat16):
        encode.nets.to(dtype)
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            step_loss(net, encode, real).backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    cosine = torch.nn.functional.cosine_similarity(*grads, dim=0).item()
    print(f"\ncosine of bf16 and float32: {cosine:.4f}", end="")
    assert cosine > 0.95


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("new_api", [False, True])
def test_the_drift_is_exact_whatever_precision_is_set(new_api, compiled):
    x, y = torch.randn(2, 16, 64) + 30, torch.randn(2, 16, 64) + 30

    def gradient(loss):
        leaf = x.clone().requires_grad_()
        loss(leaf, y)[0].backward()
        return leaf.grad

    loss = drift.drift_loss
    exact = gradient(loss)
    if compiled:
        torch._dynamo.reset()
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    if new_api:
        cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        cuda.fp32_precision, cpu.fp32_precision = "tf32", "bf16"
    else:
        torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient(loss)
        assert drift.drift_field(x.bfloat16(), y, x, 0.5).dtype == torch.float32
    if new_api:
        assert (cuda.fp32_precision, cpu.fp32_precision) == ("tf32", "bf16")
        cuda.fp32_precision = cpu.fp32_precision = "none"
    else:
        assert torch.get_float32_matmul_precision() == "medium"
        torch.set_float32_matmul_precision("highest")
    assert relative(found, exact) < 1e-5
