"""
Images to named feature vectors: the spaces in which the drift is measured.

    images [B, C, H, W] in [-1, 1]  ->  {name: [B, L, C]}        L locations, C channels

Every name is a drift problem of its own: it has its own scale, and the losses of all names are added, so that encoders
mix without weights. Nothing here is needed to sample. --encoder of train.py takes a list of these:

    pixels              the image as one vector, and mean-pooled copies; always included
    FILE.pt             ResNet-MAE, the paper's own encoder, as trained by this file
    hf://mae_pixel_640  one that the authors have released, or a local folder with it
    dinov2, clip, ...   a foundation model of ALIASES; timm:NAME any other of timm's

Run by itself, this file trains a ResNet-MAE: masked reconstruction, then with a classifier on top.
$ python features.py --dataset cifar10 --out mae_cifar10.pt
$ torchrun --standalone --nproc_per_node=8 features.py --dataset cifar10 --width 64 --patch 1 --steps 20000
"""
import math
import os
import re
import signal
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # now: imported later, its default arguments would hold the process group past its end
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

MOCOV3 = "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/linear-vit-b-300ep.pth.tar"
ALIASES = {  # name: (timm's name, input size if it is not to be timm's own, what differs from timm's configuration)
    "dino": ("vit_small_patch16_224.dino", None, {}),
    "dinov2": ("vit_small_patch14_dinov2.lvd142m", 224, {}),               # timm's own 518 costs five times as much
    "dinov3": ("vit_small_patch16_dinov3.lvd1689m", None, {}),
    "clip": ("vit_base_patch16_clip_224.openai", None, {}),
    "siglip": ("vit_base_patch16_siglip_224.webli", None, {}),
    "mae_vit": ("vit_base_patch16_224.mae", None, {}),
    "mocov3": ("vit_base_patch16_224", None, dict(url=MOCOV3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))),
    "convnextv2": ("convnextv2_tiny.fcmae", None, {}),
    "resnet50": ("resnet50.a1_in1k", None, {}),
}
OFFICIAL_NAMES = [  # how this file calls its parameters, as a pattern, and how the official code does, with dots
    (r"^stem\.0", "encoder.conv1"), (r"^stem\.1", "encoder.gn1"),
    (r"^stages\.(\d+)\.(\d+)", r"encoder.stages_\1.layers_\2"),
    (r"\.conv(\d)\.0", r".conv\1"), (r"\.conv(\d)\.1", r".gn\1"),
    (r"\.skip\.0", ".proj_conv"), (r"\.skip\.1", ".proj_gn"),
    *((f"^norms.{i}", f"encoder.layer{i + 1}_norm") for i in range(4)),
    (r"^bridge\.0", "decoder.bridge.conv"), (r"^bridge\.1", "decoder.bridge.gn"),
    *((f"^ups.{i}.0", f"decoder.up{4 - i}{3 - i}.concat_norm_fn") for i in range(4)),
    *((f"^ups.{i}.1", f"decoder.up{4 - i}{3 - i}.proj") for i in range(4)),
    *((f"^ups.{i}.2", f"decoder.up{4 - i}{3 - i}.refine") for i in range(4)),
    (r"(proj|refine)\.0", r"\1.conv"), (r"(proj|refine)\.1", r"\1.gn"),
    (r"^head", "fc"), (r"^out", "decoder.head"),
]


def pixels(images, pools=()):
    """Raw pixels as one vector, `global` [B, 1, CHW], and mean-pooled copies, `global_mean_k` [B, 1, CHW / k^2].

    In a raw vector one stroke moved by a pixel is as far as another digit; the pooled copies see where it went.
    Raises ValueError if a k does not divide the image size.
    """
    feats = {"global": rearrange(images, "b c h w -> b 1 (c h w)")}
    for k in pools:
        if images.shape[-1] % k:
            raise ValueError(f"images of {images.shape[-1]} pixels cannot be mean-pooled by {k}: choose --pools that "
                             "divide the image size")
        feats[f"global_mean_{k}"] = rearrange(F.avg_pool2d(images, k), "b c h w -> b 1 (c h w)")
    return feats


def multiscale(maps):
    """Feature maps {f: [B, C, H, W]} -> {name: [B, L, C]}, float32 (A.5). What has three dimensions already, stays.

    f: every location; f_mean, f_std: over all locations; f_mean_k, f_std_k: over patches of k x k, k = 2 and 4, where k
    divides H and W. std = sqrt(population variance + 1e-6).
    """
    feats = {}
    for name, f in maps.items():
        f = f if f.dtype == torch.float64 else f.float()
        if f.ndim == 3:
            feats[name] = f
            continue
        H, W = f.shape[-2:]
        feats[name] = rearrange(f, "b c h w -> b (h w) c")
        for end, p, q in (("", H, W), ("_2", 2, 2), ("_4", 4, 4)):
            if H % p == 0 and W % q == 0:
                patches = f.unflatten(3, (-1, q)).unflatten(2, (-1, p))        # [B, C, H/p, p, W/q, q], without a copy
                mean = patches.mean((3, 5), keepdim=True)
                std = ((patches - mean).square().mean((3, 5)) + 1e-6).sqrt()               # var_mean is far slower here
                feats[f"{name}_mean{end}"] = rearrange(mean, "b c h 1 w 1 -> b (h w) c")
                feats[f"{name}_std{end}"] = rearrange(std, "b c h w -> b (h w) c")
    return feats


def norm_x(x):
    """Root mean square over the locations of an encoder's input [B, C, H, W], per channel: [B, 1, C]."""
    return rearrange((x.square().mean((2, 3)) + 1e-6).sqrt(), "b c -> b 1 c")


def group_norm(channels):
    return nn.GroupNorm(max(g for g in range(1, 33) if channels % g == 0), channels, eps=1e-6)


def conv_norm(c_in, c_out, kernel=3, stride=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), group_norm(c_out))


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.conv2 = conv_norm(c_in, c_out, 3, stride), conv_norm(c_out, c_out)
        self.skip = conv_norm(c_in, c_out, 1, stride) if (c_in, stride) != (c_out, 1) else nn.Identity()

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.skip(x))


class MAE(nn.Module):
    """The paper's ResNet-MAE: a convolutional encoder, a U-Net decoder for what was masked, and a linear classifier.

    channels, size: of the images; width: C of the first stage, 2C, 4C, 8C of the others; patch: pixels along each side
    of a patch that becomes one location of the input. Raises ValueError for images that the strides do not fit.
    """

    def __init__(self, channels=3, size=32, width=32, patch=1, layers=(3, 4, 6, 3), num_classes=10):
        super().__init__()
        if size % patch or size < 8 * patch:
            raise ValueError(f"images of {size} pixels are too small for a ResNet-MAE of patch {patch}: they must be "
                             f"at least {8 * patch} pixels, a multiple of {patch}")
        self.config = dict(channels=channels, size=size, width=width, patch=patch, layers=list(layers),
                           num_classes=num_classes)
        C = [width, width, 2 * width, 4 * width, 8 * width]                           # of conv1 and of the four stages
        self.patch = patch
        self.stem = conv_norm(channels * patch**2, width)
        self.stages = nn.ModuleList(nn.ModuleList(
            BasicBlock(C[i + (k > 0)], C[i + 1], 2 if i > 0 and k == 0 else 1) for k in range(n))
            for i, n in enumerate(layers))
        self.norms = nn.ModuleList(group_norm(c) for c in C[1:])
        self.bridge = conv_norm(C[4], C[4])
        self.ups = nn.ModuleList(nn.ModuleList([group_norm(C[i + 1] + C[i]), conv_norm(C[i + 1] + C[i], C[i]),
                                                conv_norm(C[i], C[i])]) for i in (3, 2, 1, 0))
        self.out = nn.Conv2d(width, channels * patch**2, 1)
        self.head = nn.Linear(C[4], num_classes)

    def features(self, images):
        """[B, C, H, W] -> {name: map}: conv1, every second block, every normalised stage; and norm_x of the input."""
        x = rearrange(images, "b c (h p) (w q) -> b (p q c) h w", p=self.patch, q=self.patch)
        maps = {"norm_x": norm_x(x)}
        x = maps["conv1"] = F.relu(self.stem(x))
        for i, (stage, norm) in enumerate(zip(self.stages, self.norms), 1):
            for k, block in enumerate(stage, 1):
                x = block(x)
                if k % 2 == 0:
                    maps[f"layer{i}_blk{k}"] = x
            x = maps[f"layer{i}"] = norm(x)
        return maps

    def forward(self, images, mask):
        """[B, C, H, W] and mask [B, 1, H, W], 1 where a pixel is hidden -> images filled in, class logits [B, K]."""
        maps = self.features(images * (1 - mask))
        y = F.relu(self.bridge(maps["layer4"]))
        for (norm, conv1, conv2), skip in zip(self.ups, ("layer3", "layer2", "layer1", "conv1")):
            y = F.interpolate(y, maps[skip].shape[-2:], mode="bilinear", align_corners=False)
            y = F.relu(conv2(F.relu(conv1(norm(torch.cat([y, maps[skip]], dim=1))))))
        filled = rearrange(self.out(y), "b (p q c) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)
        return filled, self.head(maps["layer4"].mean((2, 3)))

    @classmethod
    def from_official(cls, source):
        """The authors' encoder: hf://NAME, downloaded once, or a local folder. Raises ValueError or OSError."""
        import official                                                   # here: the rest of this file needs no other
        return official.load(source, "mae", lambda config: cls(
            config["in_channels"], 32 * config["input_patch_size"], config["base_channels"], config["input_patch_size"],
            config["layers"], config["num_classes"]))

    def official_name(self, name):
        """How the authors' files call parameter `name`: its key, and the order of the key's axes."""
        for pattern, new in OFFICIAL_NAMES:
            name = re.sub(pattern, new, name)
        *where, leaf = name.split(".")
        if leaf == "bias":
            order = (0,)
        elif "gn" in where[-1] or "norm" in where[-1]:
            leaf, order = "scale", (0,)
        else:
            leaf, order = "kernel", (1, 0) if where == ["fc"] else (3, 2, 0, 1)                        # [in, out], HWIO
        return ["/".join([*where, leaf])], order


class Timm(nn.Module):
    """A model of timm: its resize, mean and std, then its stages, or four evenly spaced blocks of a transformer.

    file: local weights instead of timm's download. pretrained=False: random ones, to test. Raises ValueError, one line,
    if timm or the weights are missing, the weights do not fit, or the input is smaller than the stride.
    """

    def __init__(self, name, size=None, file=None, overlay={}, pretrained=True):
        super().__init__()
        try:
            import timm
            from timm.models import load_state_dict
        except Exception as error:  # a torchvision of another torch raises RuntimeError
            raise ValueError(f"{name} needs timm, which does not import ({error}): pip install timm") from None
        if not timm.is_model(name):
            raise ValueError(f"timm has no model {name!r}" + nearest(name, timm.list_models(), "timm:"))
        try:
            if "url" in overlay and not file and pretrained:
                file = Path(torch.hub.get_dir()) / "checkpoints" / Path(overlay["url"]).name
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    torch.hub.download_url_to_file(overlay["url"], file)
            overlay = overlay | (dict(state_dict=load_state_dict(str(file), weights_only=True)) if file else {})
            config = timm.get_pretrained_cfg(name)
            self.size = size or config.input_size[-1]
            kwargs = dict(img_size=self.size) if config.fixed_input_size else {}
            self.net = timm.create_model(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **kwargs)
        except Exception as error:  # hub, files, keys and shapes: each raises its own
            text = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"no weights for {name} from {file or 'the hub'} ({text[:200]}): "
                             "--encoder_weights names a local file of this model") from None
        config, info = timm.data.resolve_model_data_config(self.net), self.net.feature_info
        stride = max(stage["reduction"] for stage in info)
        if self.size % stride and (kwargs or self.size < stride):
            raise ValueError(f"--encoder_size {self.size} does not fit {name}: it must be a multiple of its stride, "
                             f"{stride}")
        self.mode = config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bilinear"
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        n = len(info)                                    # stages, or the many equal blocks of a transformer
        self.take = list(range(n)) if n <= 6 else [n * i // 4 - 1 for i in (1, 2, 3, 4)]
        self.prefix = getattr(self.net, "num_prefix_tokens", 0)
        if not hasattr(self.net, "forward_intermediates"):
            self.net = timm.create_model(name, pretrained, features_only=True, pretrained_cfg_overlay=overlay)

    def features(self, images):
        x = F.interpolate(images.expand(-1, 3, -1, -1), (self.size, self.size), mode=self.mode, antialias=True)
        x = ((x + 1) / 2 - self.mean) / self.std
        maps = {"norm_x": norm_x(x)}
        if not hasattr(self.net, "forward_intermediates"):
            return maps | {f"stage{i + 1}": f for i, f in enumerate(self.net(x))}
        both = dict(return_prefix_tokens=True) if self.prefix else {}
        blocks = self.net.forward_intermediates(x, indices=self.take, intermediates_only=True, **both)
        for i, f in zip(self.take, blocks):
            if self.prefix:
                f, maps[f"stage{i + 1}_cls"] = f[0], f[1][:, :1]       # the class token, not the registers
            maps[f"stage{i + 1}"] = f
        return maps


def train_mae(path, sampler, num_classes, width=32, patch=2, layers=(2, 2, 2, 2), steps=1000, cls_share=0.7, batch=128,
              lr=2e-3, seed=0, resume=True, every=100, say=print):
    """Trains a ResNet-MAE on the images of a data.Sampler; writes it to path, reconstructions beside it; returns it.

    Half of the 2x2 patches of its input are hidden, and the loss is the mean square error there; in the last cls_share
    of the steps 0.1 * the cross-entropy of a linear classifier is added, warmed up over the first third of them. Under
    torchrun the ranks share a batch. resume: goes on from path if it is there. ValueError if that is of another plan.
    """
    path, device, (_, C, size, _) = Path(path), torch.device(sampler.device), sampler.images.shape
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    net, start = MAE(C, size, width, patch, layers, num_classes), 0
    plan = net.config | dict(steps=steps, cls_share=cls_share, batch=batch, lr=lr, seed=seed)
    batch = math.ceil(batch / world) * world
    mine = slice(rank * batch // world, (rank + 1) * batch // world)
    if resume and path.exists():
        net, checkpoint = load_mae(path)
        start = checkpoint["step"]
        other = [f"{k} {v}" for k, v in checkpoint["plan"].items() if v != plan[k]]
        if other:
            raise ValueError(f"{path} was trained with {', '.join(other)}: delete it, or name another file")
    net = net.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)
    if start == steps:
        return net
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    if start:
        optimizer.load_state_dict(checkpoint["optimizer"])
        say(f"{path}: going on after step {start}")
    began = saved = time.time()
    for step in range(start, steps):
        generator = torch.Generator(device).manual_seed(seed * 10**6 + step)       # resumed or not, the same batches
        images, labels = sampler.batch(batch, generator, mine)
        cells = torch.rand(batch, 1, *[-(-size // (2 * patch))] * 2, generator=generator, device=device)
        mask = F.interpolate((cells < 0.5).float(), scale_factor=2 * patch)[..., :size, :size]
        hidden, mask = mask.sum() * C / world, mask[mine]           # of all ranks, whose shares are unequal
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / (0.05 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            filled, logits = model(images, mask)
        mse = ((filled.float() - images).square() * mask).sum() / hidden
        ramp = (step / steps - 1 + cls_share) / (cls_share / 3 + 1e-9)  # 0 at the start of the last share, 1 a third in
        loss = mse + 0.1 * min(1, max(0, ramp)) * F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        optimizer.step()
        done = step + 1
        if done % every == 0 or done in (start + 1, steps):
            speed = (done - start) / (time.time() - began)                                           # steps per second
            say(f"{done:6d}  mse of hidden pixels {mse.item():.4f}  classifier "
                f"{(logits.argmax(1) == labels).float().mean().item():.0%}  {speed * batch:,.0f} images/s  "
                f"{timedelta(seconds=int((steps - done) / speed))} left", flush=True)
        if rank == 0 and (done == steps or time.time() - saved > 60):
            saved = time.time()
            torch.save({"config": net.config, "plan": plan, "model": net.state_dict(), "step": done} |
                       ({"optimizer": optimizer.state_dict()} if done < steps else {}), f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
            rows = [images, images * (1 - mask), torch.where(mask > 0, filled.float(), images)]
            save_rows([row[:10].detach().cpu() for row in rows], path.with_suffix(".png"))
    if world > 1:
        dist.barrier()                                                     # no rank reads path before it is there
    return net


def save_rows(rows, path):
    """Rows of images [n, C, H, W] in [-1, 1] as one PNG, pixels doubled."""
    from PIL import Image
    grid = rearrange(rows, "row n c h w -> (row h) (n w) c").repeat_interleave(2, 0).repeat_interleave(2, 1)
    array = ((grid + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(f"{path}.tmp", format="png")
    os.replace(f"{path}.tmp", path)


def knn_accuracy(a, a_labels, b, b_labels, k=20):
    """Share of the vectors b [M, C] that the majority of the k nearest a [N, C] labels rightly; by cosine."""
    mean, std = a.mean(0), a.std(0) + 1e-6
    a, b = (F.normalize((t - mean) / std, dim=1) for t in (a, b))
    votes = torch.cat([a_labels[(part @ a.T).topk(k).indices] for part in b.split(1000)])                       # [M, k]
    return (votes.mode(dim=1).values == b_labels).float().mean().item()


def nearest(name, names, prefix=""):
    from difflib import get_close_matches
    close = get_close_matches(name, names, 3, 0.5)
    return f": nearest {', '.join(prefix + c for c in close)}" if close else ""


def load_mae(path):
    """A ResNet-MAE of train_mae, and its checkpoint. Raises ValueError, one line, for anything wrong with the file."""
    try:
        with zipfile.ZipFile(path) as archive:                         # torch.load does not look at the checksums
            if archive.testzip():
                raise ValueError("a checksum differs")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        net = MAE(**checkpoint["config"])
        net.load_state_dict(checkpoint["model"])
        return net, checkpoint
    except FileNotFoundError:
        raise ValueError(f"there is no encoder file {path}: python features.py --out {path} trains one") from None
    except Exception as error:  # what torch.load raises for a damaged file has no type in common
        raise ValueError(f"{path} is damaged or not a checkpoint of features.py ({type(error).__name__})") from None


class Encoder(nn.Module):
    """Frozen encoders as one function, images [B, C, H, W] in [-1, 1] -> {name: [B, L, C]}; gradients reach the images.

    spec: names separated by commas (see above); channels, size: of the images; weights: local files for the timm models
    among them, in their order; input_size: theirs, instead of timm's own. Raises ValueError with one line.
    """

    def __init__(self, spec, channels, size, pools=(), weights=(), input_size=None, device="cpu"):
        super().__init__()
        weights, nets = list(weights), {}
        for name in spec.split(","):
            if name == "pixels":
                continue
            if name.startswith("timm:") or name in ALIASES:
                model, own_size, overlay = ALIASES.get(name, (name.removeprefix("timm:"), None, {}))
                nets[name] = Timm(model, input_size or own_size, weights.pop(0) if weights else None, overlay)
            elif name.endswith(".pt") or name.startswith("hf://") or Path(name).is_dir():
                net = nets[name] = load_mae(name)[0] if name.endswith(".pt") else MAE.from_official(name)
                if (net.config["channels"], net.config["size"]) != (channels, size):
                    raise ValueError(f"{name} is for images of {net.config['channels']} x {net.config['size']}^2, not "
                                     f"{channels} x {size}^2")
                del net.bridge, net.ups, net.out, net.head                      # the decoder takes memory and no part
            else:
                raise ValueError(f"unknown encoder {name!r}{nearest(name, ['pixels', 'mae', *ALIASES])}; or FILE.pt of "
                                 "features.py, hf://NAME or a folder of the authors, or timm:NAME")
        if weights:
            raise ValueError(f"--encoder_weights {weights[0]}: no timm encoder is left for it")
        self.names, self.nets, self.pools = list(nets), nn.ModuleList(nets.values()), pools
        self.requires_grad_(False).eval().to(device)
        if torch.device(device).type == "cuda":
            self.to(memory_format=torch.channels_last)                                       # on a CPU it is slower
        pixels(torch.zeros(1, channels, size, size), pools)

    def forward(self, images):
        feats = pixels(images, self.pools)
        for name, net in zip(self.names, self.nets):
            feats |= {f"{name}.{key}": f for key, f in multiscale(net.features(images)).items()}
        return feats

    @torch.no_grad()
    def vector(self, images, batch=250):
        """One vector per image, [B, C], to compare images by: the last map's mean, or at most 1,024 pooled pixels."""
        if not self.nets:
            C, size = images.shape[1:3]
            k = next(k for k in range(1, size + 1) if size % k == 0 and C * (size // k) ** 2 <= 1024)
            return F.avg_pool2d(images, k).flatten(1)
        return torch.cat([[f for f in self.nets[-1].features(part).values() if f.ndim == 4][-1].float().mean((2, 3))
                          for part in images.split(batch)])


def main():
    import argparse

    import data
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Trains a ResNet-MAE, in whose features train.py "
                                "can measure the drift, and compares them with raw pixels by nearest neighbours.")
    p.add_argument("--dataset", default="cifar10", help="mnist, fashion, cifar10 or folder:PATH")
    p.add_argument("--data_dir", default="data", help="where data sets are, or are downloaded to")
    p.add_argument("--size", type=int, help="image size in pixels, if not the data set's own")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the images; else, photos only")
    p.add_argument("--width", type=int, default=32, help="channels of the first stage")
    p.add_argument("--patch", type=int, default=2, help="pixels along the side of a patch that becomes one location")
    p.add_argument("--layers", type=int, nargs=4, default=[2, 2, 2, 2], help="blocks of each stage; paper: 3 4 6 3")
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--cls_share", type=float, default=0.7, help="last share of the steps, with the classifier's loss")
    p.add_argument("--batch", type=int, default=128, help="images of a step, over all ranks")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="mae.pt", help="the encoder; reconstructions are written beside it")
    p.add_argument("--resume", action="store_true", help="go on from --out after a stop")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    sizes = args.width, args.patch, args.steps, args.batch, args.size or 1, *args.layers
    if not (1 <= min(sizes) and max(sizes) <= 10**9 and 0 <= args.cls_share <= 1 and 0 <= args.lr <= 1e6 and
            0 <= args.seed < 2**63):
        p.error("--size, --width, --patch, --layers, --steps and --batch must be at least 1, --cls_share from 0 to 1, "
                "--lr and --seed not negative")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = print if rank == 0 else lambda *a, **k: None
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        p.error(f"--device {args.device} is not to be had here")
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=12))                     # rank 0 may be reading a large folder
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if rank > 0:
            dist.barrier()                                                 # rank 0 alone downloads and builds caches
        images, labels, names = data.load(args.dataset, args.data_dir, args.size)
        test = None
        if args.dataset in ("mnist", "fashion", "cifar10"):
            test, test_labels, _ = data.load(args.dataset, args.data_dir, args.size, "test")
        if rank == 0 and world > 1:
            dist.barrier()
        flip = args.dataset not in ("digits", "mnist", "fashion") if args.flip is None else args.flip
        plan = {k: getattr(args, k) for k in ("width", "patch", "layers", "steps", "cls_share", "batch", "lr", "seed")}
        train_mae(args.out, data.Sampler(images, labels, device, flip), len(names), **plan, resume=args.resume, say=say)
    except KeyboardInterrupt:
        say(f"stopped: --resume goes on from the last minute's {args.out}")
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:  # the last: no memory, no room on the disk
        p.error(" ".join(str(error.__context__ or error).split())[:300])
    say(f"{args.out}, {Path(args.out).with_suffix('.png')}")
    if rank == 0 and test is not None:
        a, b = (data.to_float(t.to(device)) for t in (images[:10000], test[:2000]))
        encoder = Encoder(args.out, *a.shape[1:3], device=device)
        for name, vector in ("pooled features", encoder.vector), ("raw pixels", lambda x: x.flatten(1)):
            accuracy = knn_accuracy(vector(a), labels[:10000].to(device), vector(b), test_labels[:2000].to(device))
            say(f"20 nearest neighbours, {len(b):,} test images among {len(a):,}: {name} {accuracy:.3f}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
