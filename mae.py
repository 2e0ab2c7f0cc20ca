"""The paper's ResNet-MAE, the encoder in whose features the drift is measured, and its training.

About half of an image is hidden, in squares of 2 x 2 locations of `patch` x `patch` pixels, and a
U-Net fills it in. A linear classifier may join in the last steps. Averaged weights are saved.

$ python mae.py --dataset cifar10 --flip --out mae_cifar10.pt
"""

import argparse
import os
import sys
import zlib
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import data
import model


def group_norm(channels, per_group):
    """Up to 32 groups, as in the official code, of at least per_group channels each."""
    most = max(1, min(32, channels // per_group))
    groups = max(g for g in range(1, most + 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv_norm(c_in, c_out, per_group, kernel=3, stride=1):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, group_norm(c_out, per_group))


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, per_group, stride):
        super().__init__()
        self.conv1 = conv_norm(c_in, c_out, per_group, 3, stride)
        self.conv2 = conv_norm(c_out, c_out, per_group)
        same = c_in == c_out and stride == 1
        self.skip = nn.Identity() if same else conv_norm(c_in, c_out, per_group, 1, stride)

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.skip(x))


class MAE(nn.Module):
    """An encoder, a U-Net decoder for what was hidden, and a linear classifier; by default the
    paper's. width: channels of the first stage; patch: pixels along a side of a location."""

    def __init__(self, channels=3, size=32, width=32, patch=1, layers=(3, 4, 6, 3),
                 num_classes=10, group=1):  # fmt: skip
        super().__init__()
        if size % patch or size < 8 * patch:
            raise ValueError(f"{size} pixels are no 8 patches of {patch}: try --encoder pixels")
        self.config = dict(channels=channels, size=size, width=width, patch=patch)
        self.config |= dict(layers=list(layers), num_classes=num_classes, group=group)
        C = [width, width, 2 * width, 4 * width, 8 * width]  # of the stem and of the four stages
        self.stem = conv_norm(channels * patch**2, width, group)
        self.stages = nn.ModuleList()
        for i, count in enumerate(layers):
            blocks = [BasicBlock(C[i], C[i + 1], group, stride=1 if i == 0 else 2)]
            blocks += [BasicBlock(C[i + 1], C[i + 1], group, 1) for _ in range(count - 1)]
            self.stages.append(nn.ModuleList(blocks))
        self.norms = nn.ModuleList(group_norm(c, group) for c in C[1:])
        self.bridge = conv_norm(C[4], C[4], group)
        self.ups = nn.ModuleList()
        for i in (3, 2, 1, 0):
            both = C[i + 1] + C[i]  # from below, and the skip
            up = [conv_norm(both, C[i], group), conv_norm(C[i], C[i], group)]
            self.ups.append(nn.ModuleList([group_norm(both, group), *up]))
        self.out = nn.Conv2d(width, channels * patch**2, 1)
        self.head = nn.Linear(C[4], num_classes)

    def features(self, images):
        """Maps {name: [B, C, H, W]} of images, and norm_x [B, 1, C], their root mean square."""
        p = self.config["patch"]
        x = rearrange(images, "b c (h p) (w q) -> b (p q c) h w", p=p, q=p)
        maps = {"norm_x": (x.square().mean((2, 3)) + 1e-6).sqrt().unsqueeze(1)}
        x = maps["conv1"] = F.relu(self.stem(x.to(self.stem[0].weight.dtype)))  # bf16 on a GPU
        for i, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True), 1):
            for k, block in enumerate(stage, 1):
                x = block(x)
                if k % 2 == 0:
                    maps[f"layer{i}_blk{k}"] = x
            x = maps[f"layer{i}"] = norm(x)
        return maps

    def forward(self, images, mask):
        """Images, mask [B, 1, H, W], 1: hidden -> images filled in, logits [B, num_classes]."""
        maps = self.features(images * (1 - mask))
        y = F.relu(self.bridge(maps["layer4"]))
        skips = [maps[name] for name in ("layer3", "layer2", "layer1", "conv1")]
        for (norm, conv1, conv2), skip in zip(self.ups, skips, strict=True):
            y = F.interpolate(y, skip.shape[-2:], mode="bilinear", align_corners=False)
            y = F.relu(conv1(norm(torch.cat([y, skip], dim=1))))
            y = F.relu(conv2(y))
        p = self.config["patch"]
        filled = rearrange(self.out(y), "b (p q c) h w -> b c (h p) (w q)", p=p, q=p)
        return filled, self.head(maps["layer4"].mean((2, 3)))


def load(path):
    """The ResNet-MAE of a file of train(). Raises ValueError."""
    return model.load(path, lambda config: MAE(**config), "model")[0]


def draw_mask(n, size, patch, generator):
    """[n, 1, size, size]: each 2 x 2 of the encoder's locations is hidden (1) or not, by a coin."""
    cells = -(-size // (2 * patch))
    hidden = torch.rand(n, 1, cells, cells, generator=generator, device=generator.device) < 0.5
    return F.interpolate(hidden.float(), scale_factor=2 * patch)[..., :size, :size]


def reconstruction(filled, images, mask, patch):
    """The official loss: square error, summed over channels, mean over hidden locations."""
    error = ((filled.float() - images).square() * mask).sum((1, 2, 3))
    locations = mask.sum((1, 2, 3)) / patch**2
    return (error / locations.clamp(min=1)).mean()


def train(sampler, classes, path, width=32, layers=(2, 2, 2, 2), patch=2, steps=1000, batch=128,
          group=8, cls_steps=0, lr=2e-3, warmup=50, ema=0.9995):  # fmt: skip
    """Trains a ResNet-MAE on a data.Sampler and writes it to path, with a picture of images, their
    visible parts, and these filled in. In the last cls_steps, a classifier gets 0.1 of the loss."""
    path, device = Path(path), sampler.device
    data.check_writable(path)
    C, size = sampler.images.shape[-3:-1]
    torch.manual_seed(0)
    net = MAE(C, size, width, patch, layers, classes, group).to(device)
    if device.type == "cuda":
        net = net.to(memory_format=torch.channels_last)  # on a CPU it is slower
    average = deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr, (0.9, 0.95), weight_decay=0.01, fused=True)
    g = torch.Generator(device).manual_seed(0)
    for step in range(1, steps + 1):
        index = torch.randint(len(sampler.images), (batch,), generator=g, device=device)
        images = sampler.fetch(index, torch.rand(batch, generator=g, device=device))
        mask = draw_mask(batch, size, patch, g)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            filled, logits = net(images, mask)
        loss = reconstruction(filled, images, mask, patch)
        since = step - (steps - cls_steps)
        c = 0.1 * min(1, 3 * since / cls_steps) if since > 0 else 0.0
        both = (1 - c) * loss + c * F.cross_entropy(logits.float(), sampler.labels[index])
        optimizer.zero_grad()
        both.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        optimizer.param_groups[0]["lr"] = lr * min(1, step / max(1, warmup))
        optimizer.step()
        decay = min(ema, step / (step + 9))  # the random first weights are soon forgotten
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
        if step % 100 == 0 or step in (1, steps):
            print(f"{step:6d}  loss {loss.item():.4f}", flush=True)
    if not loss.isfinite():
        raise ValueError("the encoder's loss is not finite: it is not saved")
    part = Path(f"{path}.{os.getpid()}.tmp")  # another run may train the same encoder
    torch.save(dict(config=net.config, model=average.state_dict()), part)
    part.replace(path)
    if C in (1, 3):
        rows = [images, images * (1 - mask), torch.where(mask > 0, filled.float(), images)]
        rows = torch.cat([row[:10].detach() for row in rows])
        data.save_grid(data.to_uint8(rows), path.with_suffix(".png"))


def of_data(sampler, classes, data_dir):
    """The path of the encoder for a data.Sampler's images; trains it first if there is none."""
    size, steps = sampler.images.shape[-1], 20000 if sampler.device.type == "cuda" else 1000
    every = 1 + sampler.images.nbytes // 2**30  # of larger sets than a gigabyte, every second, ...
    digest = zlib.crc32(sampler.images[::every].cpu().numpy().tobytes())
    path = Path(data_dir) / f"mae-{digest:08x}-{steps}.pt"
    if not path.exists():
        print(f"training an encoder, {path}; --encoder FILE.pt takes another", flush=True)
        patch = max(k for k in range(1, max(1, size // 16) + 1) if size % k == 0)
        train(sampler, classes, path, patch=patch, steps=steps)
    return str(path)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--size", type=int, help="image size, if not the set's own")
    p.add_argument("--flip", action="store_true", help="mirror half of the images")
    p.add_argument("--layers", type=int, nargs=4, default=[2, 2, 2, 2], help="blocks of a stage")
    counts = dict(width=32, patch=2, steps=1000, batch=128, cls_steps=0, lr=2e-3, warmup=50)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    more = dict(dataset="cifar10", data_dir="data", out="mae.pt", device=device)  # as of train.py
    for name, default in (counts | more).items():
        p.add_argument(f"--{name}", type=type(default), default=default)
    args = p.parse_args(argv)
    plan = {name: getattr(args, name) for name in ("layers", *counts)}
    try:
        device = model.usable(args.device)
        images, labels, names = data.load(args.dataset, args.data_dir, args.size)
        train(data.Sampler(images, labels, device, args.flip), len(names), args.out, **plan)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"mae.py: error: {str(error) or 'stopped, nothing is saved'}")


if __name__ == "__main__":
    main()
