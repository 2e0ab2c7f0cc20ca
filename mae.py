"""
The paper's ResNet-MAE, the encoder in whose features the drift is measured, and its training.

About half of an image is hidden, in squares of 2 x 2 locations of `patch` x `patch` pixels, and a
U-Net has to fill it in; what its encoder has learnt to see is the feature space. In the last steps
a linear classifier may join on top. The average of the weights is what is saved.

$ python mae.py --dataset cifar10 --out mae_cifar10.pt
$ python train.py --dataset cifar10 --encoder mae_cifar10.pt

What `train.py --encoder mae` trains first on a GPU, on eight
$ torchrun --standalone --nproc_per_node=8 mae.py --width 64 --patch 1 --layers 3 4 6 3 \
      --steps 20000 --batch 512

The paper's for its ablation, on latents with random crops by `python data.py encode`
$ torchrun --standalone --nproc_per_node=8 mae.py --dataset latents:latents --width 256 --patch 1 \
      --layers 3 4 6 3 --batch 8192 --lr 4e-3 --warmup 4000 --steps 30000
"""

import argparse
import math
import signal
import time
import zlib
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import data
from model import load_checkpoint


def norm_x(x):
    """Root mean square over locations of an encoder's input [B, C, H, W], [B, 1, C]."""
    return (x.square().mean((2, 3)) + 1e-6).sqrt().unsqueeze(1)


def group_norm(channels, per_group):
    """Up to 32 groups, as officially, but of at least so many channels each."""
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
    """The paper's ResNet-MAE: an encoder, a U-Net decoder for what was masked, a linear classifier.

    channels, size: of the images; width: C of the first stage, 2C, 4C, 8C of the others; patch:
    pixels along each side of a patch that becomes one location; group: channels that GroupNorm
    takes together at least. The defaults of patch, layers and group are the paper's. Raises
    ValueError for images that the strides do not fit.
    """

    def __init__(
        self,
        channels=3,
        size=32,
        width=32,
        patch=1,
        layers=(3, 4, 6, 3),
        num_classes=10,
        group=1,
    ):
        super().__init__()
        if size % patch or size < 8 * patch:
            needs = f"at least {8 * patch} pixels, a multiple of {patch}"
            raise ValueError(f"images of {size} pixels are too small for this ResNet-MAE: {needs}")
        self.config = dict(channels=channels, size=size, width=width, patch=patch)
        self.config |= dict(layers=list(layers), num_classes=num_classes, group=group)
        self.patch = patch
        C = [width, width, 2 * width, 4 * width, 8 * width]  # of the stem and of the four stages
        self.stem = conv_norm(channels * patch**2, width, group)
        self.stages = nn.ModuleList()
        for i, count in enumerate(layers):
            stride = 1 if i == 0 else 2
            blocks = [BasicBlock(C[i], C[i + 1], group, stride)]
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
        """Maps {name: [B, C, H, W]} of images: the stem, every second block, every normalised
        stage; and norm_x [B, 1, C] of the input."""
        p = self.patch
        x = rearrange(images, "b c (h p) (w q) -> b (p q c) h w", p=p, q=p)
        maps = {"norm_x": norm_x(x)}
        x = x.to(self.stem[0].weight.dtype)  # bf16 on a GPU
        x = maps["conv1"] = F.relu(self.stem(x))
        for i, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True), 1):
            for k, block in enumerate(stage, 1):
                x = block(x)
                if k % 2 == 0:
                    maps[f"layer{i}_blk{k}"] = x
            x = maps[f"layer{i}"] = norm(x)
        return maps

    def forward(self, images, mask):
        """Images [B, C, H, W] and mask [B, 1, H, W], 1 where a pixel is hidden.

        -> the images filled in, and logits [B, num_classes].
        """
        maps = self.features(images * (1 - mask))
        y = F.relu(self.bridge(maps["layer4"]))
        skips = [maps[name] for name in ("layer3", "layer2", "layer1", "conv1")]
        for (norm, conv1, conv2), skip in zip(self.ups, skips, strict=True):
            y = F.interpolate(y, skip.shape[-2:], mode="bilinear", align_corners=False)
            y = F.relu(conv1(norm(torch.cat([y, skip], dim=1))))
            y = F.relu(conv2(y))
        p = self.patch
        filled = rearrange(self.out(y), "b (p q c) h w -> b c (h p) (w q)", p=p, q=p)
        return filled, self.head(maps["layer4"].mean((2, 3)))

    @classmethod
    def from_official(cls, source):
        """The authors' encoder, hf://NAME or a folder; ValueError or OSError of one line."""
        import official  # here: the rest of this file needs no other

        return official.load_mae(source)


def load_mae(path):
    """A ResNet-MAE of train_mae() and its checkpoint. Raises ValueError, one line."""
    try:
        checkpoint = load_checkpoint(path)
        net = MAE(**checkpoint["config"])
        net.load_state_dict(checkpoint["model"])
        return net, checkpoint
    except FileNotFoundError:
        raise ValueError(f"there is no encoder file {path}: python mae.py trains one") from None
    except Exception as error:  # what torch raises for a damaged file has no type in common
        wrong = type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint of mae.py ({wrong})") from None


def draw_mask(n, size, patch, generator):
    """[n, 1, size, size]: each 2 x 2 of the encoder's locations is hidden (1) or not, by a coin."""
    cells = -(-size // (2 * patch))
    hidden = torch.rand(n, 1, cells, cells, generator=generator, device=generator.device) < 0.5
    return F.interpolate(hidden.float(), scale_factor=2 * patch)[..., :size, :size]


def write(path, state, images, mask, filled):
    """A checkpoint, and beside it a picture: images, what was shown, what was made of that."""
    with data.whole(path) as file:
        torch.save(state, file)
    if images.shape[1] not in (1, 3):
        return  # latents and the like are no pictures
    rows = [images, images * (1 - mask), torch.where(mask > 0, filled, images)]
    rows = data.to_uint8(torch.cat([row[:10] for row in rows]))
    data.save_grid(rows, path.with_suffix(".png"), columns=min(10, len(images)))


def reconstruction(filled, images, mask, patch):
    """The official loss: the square error of what was hidden, summed over channels, mean over an
    image's hidden locations, then over images. A location is a patch of pixels."""
    error = ((filled.float() - images).square() * mask).sum((1, 2, 3))
    locations = mask.sum((1, 2, 3)) / patch**2
    return (error / locations.clamp(min=1)).mean()


def load_same(path, plan):
    """load_mae() of a run that may be gone on with. ValueError if it was of another plan."""
    average, checkpoint = load_mae(path)
    old = checkpoint.get("plan", {})
    if not plan["cls_steps"]:
        old = old | {"num_classes": plan["num_classes"]}  # without a classifier it changes nothing
    other = [f"{k} {v}" for k, v in old.items() if v != plan.get(k)]
    if other:
        how = "name another file, or delete it"
        raise ValueError(f"{path} was trained with {', '.join(other)}: {how}")
    return average, checkpoint


def train_mae(
    path,
    sampler,
    num_classes,
    width=32,
    patch=2,
    layers=(2, 2, 2, 2),
    group=8,  # a channel alone would forget how strong an image's contrast is
    steps=1000,
    cls_steps=0,
    batch=128,
    lr=2e-3,
    warmup=50,
    ema=0.9995,
    seed=0,
):
    """Trains a ResNet-MAE on the images of a data.Sampler; writes it to path and returns it.

    The loss is (1 - c) reconstruction() + c cross-entropy of the classifier, with c = 0 until the
    last cls_steps of the steps, over the first third of which it rises to 0.1. The rate is constant
    after the warm-up. What is saved is an average of the weights, of decay `ema`, less at first.
    Under torchrun the ranks share a batch. Goes on from path if it is there; ValueError if that is
    of another plan. Reconstructions are drawn beside it.
    """
    path, device = Path(path), torch.device(sampler.device)
    C, size = sampler.images.shape[-3:-1]
    rank, world = data.rank(), data.world_size()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    net, start = MAE(C, size, width, patch, layers, num_classes, group), 0
    plan = net.config | dict(steps=steps, cls_steps=cls_steps, batch=batch, lr=lr, warmup=warmup)
    plan |= dict(ema=ema, seed=seed)
    # so that a file is not gone on with on another data set
    plan["data"] = zlib.crc32(sampler.images[:1000].cpu().numpy().tobytes())
    average = deepcopy(net)
    if path.exists():
        average, checkpoint = load_same(path, plan)
        start = checkpoint.get("step", steps)
    average = average.to(device).requires_grad_(False)
    if start == steps:
        return average
    if start:
        net.load_state_dict(checkpoint["raw"])
        data.say(f"{path}: going on after step {start}")
    net = net.to(device)
    if device.type == "cuda":
        net = net.to(memory_format=torch.channels_last)  # on a CPU it is slower
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.AdamW(net.parameters(), lr, (0.9, 0.95), weight_decay=0.01, fused=True)
    if start:
        optimizer.load_state_dict(checkpoint["optimizer"])
    batch = math.ceil(batch / world) * world
    mine = slice(rank * batch // world, (rank + 1) * batch // world)
    began = saved = time.time()
    with data.progress(path.stem, steps, " steps") as bar:
        bar(start)
        for step in range(start, steps):
            generator = torch.Generator(sampler.home).manual_seed(seed * 10**6 + step)
            images, labels = sampler.batch(batch, generator, mine)
            mask = draw_mask(batch, size, patch, generator).to(device)[mine]
            for settings in optimizer.param_groups:
                settings["lr"] = lr * min(1, (step + 1) / max(1, warmup))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                filled, logits = model(images, mask)
            loss = reconstruction(filled, images, mask, patch)
            c = 0.0
            if step >= steps - cls_steps:
                c = 0.1 * min(1, (step - steps + cls_steps) / (cls_steps / 3))
            both = (1 - c) * loss + c * F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            both.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 2.0)
            optimizer.step()
            # Without the second limit, a short run would keep some of its random first weights.
            decay = min(ema, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)

            bar(1)
            done = step + 1
            if done % 100 == 0 or done in (start + 1, steps):
                speed = (done - start) / (time.time() - began)  # steps per second
                left = timedelta(seconds=int((steps - done) / speed))
                line = f"{done:6d}  loss of what is hidden {loss.item():.4f}"
                if c:
                    line += f"  classifier {(logits.argmax(1) == labels).float().mean().item():.0%}"
                data.say(f"{line}  {speed * batch:,.0f} images/s  {left} left")
            if data.first_on_node() and (done == steps or time.time() - saved > 60):
                saved = time.time()
                state = dict(config=net.config, plan=plan, model=average.state_dict(), step=done)
                if done < steps:
                    state |= dict(raw=net.state_dict(), optimizer=optimizer.state_dict())
                write(path, state, images, mask, filled.detach().float())
    data.wait()  # no rank reads path before it is there
    return average


def knn_accuracy(a, a_labels, b, b_labels, k=20):
    """Share of vectors b [M, C] that the k nearest of a [N, C], by cosine, label rightly."""
    mean, std = a.mean(0), a.std(0) + 1e-6
    a, b = F.normalize((a - mean) / std, dim=1), F.normalize((b - mean) / std, dim=1)
    votes = [a_labels[(part @ a.T).topk(k).indices] for part in b.split(1000)]
    return (torch.cat(votes).mode(dim=1).values == b_labels).float().mean().item()


@torch.no_grad()
def compare_with_pixels(net, train, train_labels, test, test_labels, device):
    """Prints how well nearest neighbours among features, and among pixels, tell classes apart."""
    a, b = data.to_float(train[:10000].to(device)), data.to_float(test[:2000].to(device))
    labels = train_labels[:10000].to(device), test_labels[:2000].to(device)
    pixels = knn_accuracy(a.flatten(1), labels[0], b.flatten(1), labels[1])
    a, b = (
        torch.cat([net.features(part)["layer4"].mean((2, 3)) for part in images.split(250)])
        for images in (a, b)
    )
    pooled = knn_accuracy(a, labels[0], b, labels[1])
    print(f"20 nearest neighbours: pooled features {pooled:.3f}, raw pixels {pixels:.3f}")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument(
        "--dataset",
        default="cifar10",
        help="cifar10, mnist, fashion, digits, or a PATH as of train.py",
    )
    p.add_argument("--data_dir", default="data", help="where data sets are, or are downloaded to")
    p.add_argument("--size", type=data.positive_int, help="image size, if not the set's own")
    p.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="mirror half of the images; if not given: of photos",
    )
    p.add_argument("--width", type=data.positive_int, default=32, help="channels of stage one")
    p.add_argument(
        "--patch", type=data.positive_int, default=2, help="a location is so many pixels wide"
    )
    p.add_argument(
        "--layers", type=data.positive_int, nargs=4, default=[2, 2, 2, 2], help="paper: 3 4 6 3"
    )
    p.add_argument("--steps", type=data.positive_int, default=1000)
    p.add_argument(
        "--cls_steps",
        type=data.number(int, 0, 10**9),
        default=0,
        help="train a classifier, too, in so many last steps; theirs: 3000",
    )
    p.add_argument("--batch", type=data.positive_int, default=128, help="images, of all ranks")
    p.add_argument("--lr", type=data.number(float, 0, 1e6), default=2e-3)
    p.add_argument("--warmup", type=data.number(int, 0, 10**9), default=50, help="steps to --lr")
    p.add_argument("--ema", type=data.share, default=0.9995, help="decay of the weights' average")
    p.add_argument("--seed", type=data.seed, default=0)
    p.add_argument("--out", default="mae.pt", help="the encoder; goes on from it if it is there")
    p.add_argument("--device", type=data.device, default=data.default_device())
    args = p.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    data.start_ranks(args.device)
    with data.node_first():
        images, labels, names = data.load(args.dataset, args.data_dir, args.size)
    if images.ndim == 5 and images.shape[1] > 2:
        images = images[:, 2:]  # an image and its mirror image, then random crops
    photos = images.dtype == torch.uint8 and args.dataset not in ("digits", "mnist", "fashion")
    flip = photos if args.flip is None else args.flip
    sampler = data.Sampler(images, labels, args.device, flip)
    plan = (
        "width",
        "patch",
        "layers",
        "steps",
        "cls_steps",
        "batch",
        "lr",
        "warmup",
        "ema",
        "seed",
    )
    plan = {name: getattr(args, name) for name in plan}
    net = train_mae(args.out, sampler, len(names), **plan)
    data.say(f"{args.out}, {Path(args.out).with_suffix('.png')}")
    if data.rank() == 0 and args.dataset in ("mnist", "fashion", "cifar10"):
        test, test_labels, _ = data.load(args.dataset, args.data_dir, args.size, "test")
        compare_with_pixels(net.eval(), images, labels, test, test_labels, args.device)
    data.finish()


if __name__ == "__main__":
    data.run(main)
