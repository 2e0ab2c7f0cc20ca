"""Images to named feature vectors: the spaces in which the drift is measured.

    images [B, C, H, W] in [-1, 1]  ->  {name: [B, l, C]}        l locations, C channels

Every name is a drift problem with its own scale, and their losses are added. --encoder of train.py:

    pixels, pool:K      the image as one vector; averaged over K x K pixels before
    window:K            windows of K x K pixels that overlap by half
    mae                 a ResNet-MAE that train.py trains on the data first
    FILE.pt             a ResNet-MAE, the paper's own encoder, trained by mae.py
    dinov2, timm:NAME   a network of ALIASES, or any other one of timm
    NAME@SIZE=FILE      either, with an input size in pixels, a local file of weights, or both
    MODULE:CLASS        a module of your own, whose features() gives maps as Timm's does
"""

import pkgutil
import re
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint as recompute

import data
import mae

ALIASES = {  # name: timm's name; the input size is 224 if no other is given
    "dino": "vit_small_patch16_224.dino",
    "dinov2": "vit_small_patch14_dinov2.lvd142m",
    "dinov3": "vit_small_patch16_dinov3.lvd1689m",
    "clip": "vit_base_patch16_clip_224.openai",
    "siglip": "vit_base_patch16_siglip_224.webli",
}


def multiscale(maps):
    """Feature maps {f: [B, C, H, W]} -> {name: [B, l, C]} (A.5): f at every location; f_mean, f_std
    over all locations; f_mean_k, f_std_k over patches of k x k, k = 2 and 4, where k divides H and
    W. Features [B, l, C] stay as they are. In float32, then of the map's type."""
    feats = {}
    for name, f in maps.items():
        if f.ndim == 3:
            feats[name] = f
            continue
        feats[name] = rearrange(f, "b c h w -> b (h w) c")
        H, W = f.shape[-2:]
        x = f.to(torch.promote_types(f.dtype, torch.float32))
        for end, p, q in (("", H, W), ("_2", 2, 2), ("_4", 4, 4)):
            if H % p or W % q:
                continue
            patches = x.unflatten(3, (-1, q)).unflatten(2, (-1, p))  # [B, C, H/p, p, W/q, q]
            mean = patches.mean((3, 5), keepdim=True)
            std = ((patches - mean).square().mean((3, 5)) + 1e-6).sqrt()  # var_mean() is far slower
            feats[f"{name}_mean{end}"] = mean.flatten(2).mT.to(f.dtype)
            feats[f"{name}_std{end}"] = std.flatten(2).mT.to(f.dtype)
    return feats


def fold(net):
    """Makes BatchNorms a part of the convolutions before them, which saves memory traffic."""
    for module in net.modules():
        for (conv_name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, getattr(norm, "act", nn.Identity()))  # timm's has one
    return net


def in_parts(f, size, *inputs):
    """f(*inputs), a dictionary of tensors [B, ...], by at most `size` rows at a time; 0: all. The
    backward pass computes a part again, so that activations of one part alone are held."""
    if not size:
        return f(*inputs)
    parts = zip(*(t.split(size) for t in inputs), strict=True)
    parts = [recompute(f, *part, use_reentrant=False) for part in parts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Timm(nn.Module):
    """The maps of a network's stages, or a transformer's last tokens; file: local weights."""

    def __init__(self, name, size=None, file=None, pretrained=True):
        super().__init__()
        with data.one_line(f"cannot load {name}", "try --encoder pixels pool:2 pool:4 mae"):
            import timm

            config = timm.get_pretrained_cfg(name, allow_unregistered=False)
            self.size = size or config.input_size[-1]
            kwargs = {"img_size": self.size} if config.fixed_input_size else {}
            overlay = {"file": file} if file else None
            net = timm.create_model(name, pretrained, pretrained_cfg_overlay=overlay, **kwargs)
            stride = net.feature_info[-1]["reduction"]
            if hasattr(net, "num_prefix_tokens") and self.size % stride:
                raise ValueError(f"{self.size} pixels are no multiple of {stride}")
        self.is_efficientnet = isinstance(net, timm.models.EfficientNet)
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1))
        self.net = fold(net.eval()).to(memory_format=torch.channels_last)

    def resized(self, images):
        images = images.expand(-1, 3, -1, -1)
        return F.interpolate(images, self.size, mode="bilinear", antialias=True)

    def features(self, images):
        """Maps {name: [B, C, H, W]}, and the class token [B, 1, C], of images [B, C, H, W]."""
        x = ((self.resized(images) + 1) / 2 - self.mean) / self.std
        x = x.to(next(self.net.parameters()).dtype)  # bf16 on a GPU
        if self.is_efficientnet:  # MobileNetV2: its first stage is large, its last near the classes
            x = self.net.blocks[0](self.net.bn1(self.net.conv_stem(x)))
            maps = {}
            for i, stage in enumerate(self.net.blocks[1:-1], 1):
                x = maps[f"stage{i}"] = stage(x)
            return maps
        if hasattr(self.net, "num_prefix_tokens"):  # a transformer; SigLIP's has no class token
            how = dict(indices=1, norm=True, intermediates_only=True, return_prefix_tokens=True)
            [f] = self.net.forward_intermediates(x, **how)
            return {"tokens": f[0], "cls": f[1][:, :1]} if isinstance(f, tuple) else {"tokens": f}
        stages = self.net.forward_intermediates(x, intermediates_only=True)
        fewer = [f for f in stages if f.shape[-1] <= self.size // 4]
        return {f"stage{i}": f for i, f in enumerate(fewer, 1)}


def build(name, channels, size):
    """The network of one name of --encoder, for images [B, channels, size, size]."""
    if name.endswith(".pt") and "=" not in name:
        net = mae.load(name)
        theirs, ours = (net.config["channels"], net.config["size"]), (channels, size)
        if theirs != ours:
            raise ValueError(f"{name} is for images of (channels, pixels) {theirs}, not {ours}")
        return net
    if ":" in name and not name.startswith("timm:"):
        return pkgutil.resolve_name(name)()
    model, at_size, file = re.fullmatch(r"(.*?)(?:@(\d+))?(?:=(.*))?", name).groups()
    if not model.startswith("timm:") and model not in ALIASES:
        raise ValueError(f"no encoder {name}: the top of features.py lists them")
    if channels not in (1, 3):
        raise ValueError(f"{name} is for images of 1 or 3 channels, not {channels}")
    input_size = int(at_size) if at_size else 224 if model in ALIASES else None
    return Timm(ALIASES.get(model, model.removeprefix("timm:")), input_size, file)


class Encoder(nn.Module):
    """Frozen encoders: images [B, C, H, W] -> {name: [B, l, C]}. Raises ValueError."""

    def __init__(self, names, channels, size, device="cpu"):
        super().__init__()
        self.pixels, self.names, self.nets = {}, [], nn.ModuleList()
        for name in names:
            kind, _, k = ("pool:1" if name == "pixels" else name).partition(":")
            if kind in ("pool", "window"):
                k = int(k) if k.isdecimal() else 0
                shifts = 2 if kind == "window" else 1  # windows are half of their size apart
                if k % shifts or not 1 <= k <= size or size % (k // shifts):
                    raise ValueError(f"--encoder {name} does not fit images of {size} pixels")
                self.pixels[name] = kind, k
            else:
                self.names.append(name)
                self.nets.append(build(name, channels, size))
        self.requires_grad_(False).eval().to(device)
        for net in self.nets:
            if torch.device(device).type == "cuda" and not getattr(net, "float32", False):
                net = net.net if isinstance(net, Timm) else net
                net.to(dtype=torch.bfloat16, memory_format=torch.channels_last)

    @torch.autocast("cuda", enabled=False)  # the networks have types of their own
    def forward(self, images):
        feats = {}
        for name, (kind, k) in self.pixels.items():
            if kind == "window":
                windows = images.unfold(2, k, k // 2).unfold(3, k, k // 2)  # [B, C, h, w, k, k]
                feats[name] = rearrange(windows, "b c h w p q -> b (h w) (c p q)")
            else:
                feats[name] = F.avg_pool2d(images, k).flatten(1).unsqueeze(1)
        for name, net in zip(self.names, self.nets, strict=True):
            for key, f in multiscale(net.features(images)).items():
                feats[f"{name}.{key}"] = f
        return feats
