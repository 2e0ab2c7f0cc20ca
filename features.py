"""
Images to named feature vectors: the spaces in which the drift is measured.

    images [B, C, H, W] in [-1, 1]  ->  {name: [B, l, C]}        l locations, C channels

Every name is a drift problem of its own: it has its own scale, and the losses of all names are
added, so that encoders mix without weights. Nothing here is needed to sample. --encoder of train.py
takes one of these, or several separated by commas:

    pixels              the image as one vector, always included; pooled copies, windows and edges
                        by --pools, --windows and --edges
    mae                 a ResNet-MAE that train.py trains on the data first
    FILE.pt             a ResNet-MAE, the paper's own encoder, as trained by mae.py
    hf://mae_pixel_640  one that the authors have released, or a local folder with it
    dinov2, clip, ...   a foundation model of ALIASES; timm:NAME any other of timm's
    NAME=FILE           any of timm's, with weights from a local file
"""

import math
from difflib import get_close_matches
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from data import one_line
from mae import MAE, load_mae, norm_x

ALIASES = {  # name: (timm's name, input size if it is not to be timm's own)
    "dino": ("vit_small_patch16_224.dino", None),
    "dinov2": ("vit_small_patch14_dinov2.lvd142m", 224),  # timm's own 518 costs five times as much
    "dinov3": ("vit_small_patch16_dinov3.lvd1689m", None),
    "clip": ("vit_base_patch16_clip_224.openai", None),
    "siglip": ("vit_base_patch16_siglip_224.webli", None),
    "convnextv2": ("convnextv2_base.fcmae_ft_in22k_in1k", 224),  # of the paper's pixel models
}


def cut_windows(images, k):
    """Overlapping windows of images [B, C, H, W]: k x k pixels, every k / 2, as [B, l, C k^2]."""
    cut = images.unfold(2, k, k // 2).unfold(3, k, k // 2)  # [B, C, h, w, k, k]
    return rearrange(cut, "b c h w p q -> b (h w) (c p q)")


def pixels(images, pools=(), windows=()):
    """Raw pixels `global` [B, 1, CHW], mean-pooled copies `global_mean_k` [B, 1, CHW / k^2], and
    windows of k x k pixels, every k / 2 pixels, `window_k` [B, l, C k^2].

    In a raw vector, one stroke moved by a pixel is as far as another digit; the pooled copies see
    where it went. Whole images have no near neighbour among a hundred real ones, but windows do:
    one that has the same stroke there, whatever it has elsewhere. Windows are not official.
    Raises ValueError if pools or windows do not fit the image size.
    """
    size = images.shape[-1]
    feats = {"global": images.flatten(1).unsqueeze(1)}
    for k in pools:
        if size % k:
            raise ValueError(f"--pools {k} does not divide the image size, {size} pixels")
        feats[f"global_mean_{k}"] = F.avg_pool2d(images, k).flatten(1).unsqueeze(1)
    for k in windows:
        if k % 2 or k > size or (size - k) % (k // 2):
            raise ValueError(
                f"--windows {k}: even, at most {size}, and its half a divisor of {size}"
            )
        feats[f"window_{k}"] = cut_windows(images, k)
    return feats


def edges(images):
    """How strongly an image changes in 8 directions, per cell of 2 x 2 pixels: as a whole, averaged
    over 2 x 2 cells, `edges` [B, 1, 8 (H / 4)^2], and in windows of 4 x 4 cells, that is 8 x 8
    pixels, every 4 pixels, `edges_4` [B, l, 128]; images [B, C, H, W], H = W.

    Most of what tells two windows of pixels apart is their colour; where an outline runs, and which
    way, is lost in it. These are its differences of brightness alone, split by direction and
    averaged over 2 x 2 pixels, so that an outline may move a little: a descriptor like HOG (Dalal
    and Triggs, 2005), with a square root, by which faint outlines count beside strong ones, instead
    of its normalisation. Not official. Raises ValueError if 4 does not divide the image size, or it
    is below 8.
    """
    size = images.shape[-1]
    if size % 4 or size < 8:
        raise ValueError(f"--edges needs images of 8, 12, 16 ... pixels, not {size}")
    grey = images.mean(1, keepdim=True)
    right = F.pad(grey[..., 1:] - grey[..., :-1], (0, 1, 0, 0))
    down = F.pad(grey[:, :, 1:] - grey[:, :, :-1], (0, 0, 0, 1))
    angles = [i * math.pi / 4 for i in range(8)]
    along = [F.relu(right * math.cos(angle) + down * math.sin(angle)) for angle in angles]
    strength = F.avg_pool2d(torch.cat(along, dim=1), 2)  # [B, 8, H / 2, W / 2]
    strength = (strength + 0.01).sqrt()  # the slope of a root is infinite at zero
    whole = F.avg_pool2d(strength, 2).flatten(1).unsqueeze(1)
    return {"edges": whole, "edges_4": cut_windows(strength, 4)}


def pooled_pixels(images, most=1024):
    """Images [B, C, H, W] mean-pooled to at most so many numbers, as vectors [B, C]."""
    C, size = images.shape[1:3]
    fits = [k for k in range(1, size + 1) if size % k == 0 and C * (size // k) ** 2 <= most]
    return F.avg_pool2d(images, fits[0]).flatten(1)


def multiscale(maps):
    """Feature maps {f: [B, C, H, W]} -> {name: [B, l, C]} (A.5).

    f: every location; f_mean, f_std: over all locations; f_mean_k, f_std_k: over patches of k x k,
    k = 2 and 4, where k divides H and W. std = sqrt(population variance + 1e-6). What has three
    dimensions already, stays. Everything is kept in the type of the map, which halves the memory of
    a bf16 encoder's features, but is computed in float32.
    """
    feats = {}
    for name, f in maps.items():
        if f.ndim == 3:
            feats[name] = f
            continue
        dtype = f.dtype
        H, W = f.shape[-2:]
        feats[name] = rearrange(f, "b c h w -> b (h w) c")
        f = f if dtype == torch.float64 else f.float()
        for end, p, q in (("", H, W), ("_2", 2, 2), ("_4", 4, 4)):
            if H % p or W % q:
                continue
            patches = f.unflatten(3, (-1, q)).unflatten(2, (-1, p))  # [B, C, H/p, p, W/q, q]
            mean = patches.mean((3, 5), keepdim=True)
            # torch.var_mean would say the same, far slower
            std = ((patches - mean).square().mean((3, 5)) + 1e-6).sqrt()
            mean, std = mean.to(dtype), std.to(dtype)
            feats[f"{name}_mean{end}"] = rearrange(mean, "b c h 1 w 1 -> b (h w) c")
            feats[f"{name}_std{end}"] = rearrange(std, "b c h w -> b (h w) c")
    return feats


class Timm(nn.Module):
    """A model of timm: its resize, mean and std, then its stages, or a transformer's last tokens,
    after its final norm.

    file: local weights instead of timm's download. pretrained=False: random ones, to test. Raises
    ValueError, one line, if timm or the weights are missing, the weights do not fit, or the input
    is smaller than the stride.
    """

    def __init__(self, name, size=None, file=None, pretrained=True):
        super().__init__()
        try:
            import timm
            from timm.models import load_state_dict
        except Exception as error:  # a torchvision of another torch raises RuntimeError
            raise ValueError(f"{name} needs pip install timm ({error})") from None
        if not timm.is_model(name):
            raise ValueError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
        config = timm.get_pretrained_cfg(name)
        self.size = size or config.input_size[-1]
        kwargs = {"img_size": self.size} if config.fixed_input_size else {}
        try:
            if file:
                state = load_state_dict(str(file), weights_only=True)
                kwargs["pretrained_cfg_overlay"] = {"state_dict": state}
            self.net = timm.create_model(name, pretrained=pretrained, **kwargs)
        except Exception as error:  # hub, files, keys and shapes: each raises its own
            how = f"no weights for {name} from {file or 'the hub'}, and NAME=FILE names local ones"
            raise ValueError(f"{how} ({one_line(error)})") from None
        info = self.net.feature_info
        stride = max(stage["reduction"] for stage in info)
        if self.size < stride or ("img_size" in kwargs and self.size % stride):
            raise ValueError(f"{name} needs an --encoder_size that is a multiple of {stride}")
        config = timm.data.resolve_model_data_config(self.net)
        self.mode = "bicubic" if config["interpolation"] == "bicubic" else "bilinear"
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        n = len(info)  # stages, or the many equal blocks of a transformer
        # Networks of stages have four to six; a transformer lists its twelve or more blocks, and
        # the raw tokens between these have a few channels of huge numbers.
        self.only_last = n > 6
        self.take = [n - 1] if self.only_last else list(range(n))
        self.prefix = getattr(self.net, "num_prefix_tokens", 0)
        self.has_intermediates = hasattr(self.net, "forward_intermediates")
        if not self.has_intermediates:
            self.net = timm.create_model(name, pretrained, features_only=True, **kwargs)

    def features(self, images):
        """Maps {name: [B, C, H, W]} and class tokens [B, 1, C] of images [B, C, H, W]."""
        size = (self.size, self.size)
        x = F.interpolate(images.expand(-1, 3, -1, -1), size, mode=self.mode, antialias=True)
        x = ((x + 1) / 2 - self.mean) / self.std
        maps = {"norm_x": norm_x(x)}
        x = x.to(next(self.net.parameters()).dtype)  # bf16 on a GPU
        if not self.has_intermediates:
            return maps | {f"stage{i + 1}": f for i, f in enumerate(self.net(x))}
        kwargs = {"return_prefix_tokens": True} if self.prefix else {}
        blocks = self.net.forward_intermediates(
            x, indices=self.take, norm=self.only_last, intermediates_only=True, **kwargs
        )
        for i, f in zip(self.take, blocks, strict=True):
            if self.prefix:
                f, tokens = f
                maps[f"stage{i + 1}_cls"] = tokens[:, :1]  # the class token, not the registers
            maps[f"stage{i + 1}"] = f
        return maps


class ConvNeXtV2(Timm):
    """ConvNeXt-V2 as the authors' pixel models use it, which is not as Timm takes maps of others.

    Images are resized, but not brought to ImageNet's mean and deviation; every location is
    standardised over its channels; the first stage counts by its mean and deviation alone; no 2 x 2
    and 4 x 4 patches.
    """

    def features(self, images):
        """{name: [B, l, C]}, by the official names, which misspell it."""
        size = (self.size, self.size)
        x = F.interpolate(images.expand(-1, 3, -1, -1), size, mode="bilinear", antialias=True)
        x = self.net.stem(x)
        feats = {}
        for i, stage in enumerate(self.net.stages):
            x = stage(x)
            var, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
            y = rearrange((x - mean) / (var.sqrt() + 1e-3), "b c h w -> b (h w) c")
            if i > 0:
                feats[f"convenxt_stage_{i}"] = y
            mean, std = (
                y.mean(1, keepdim=True),
                (y.var(1, correction=0, keepdim=True) + 1e-6).sqrt(),
            )
            feats[f"convenxt_stage_{i}_mean"] = mean
            feats[f"convenxt_stage_{i}_std"] = std
        # global_std is that of the last stage once more, as in the official code.
        pooled = self.net.head.norm(x.mean((2, 3), keepdim=True))
        return feats | {"global_mean": pooled.flatten(2).mT, "global_std": std}


def nearest(name, names):
    close = get_close_matches(name, names, 3, 0.5)
    return f": nearest {', '.join(close)}" if close else ""


def build(name, channels, size, input_size):
    """The network of one name of --encoder, for images [B, channels, size, size]."""
    model, _, file = name.partition("=")
    if model.startswith("timm:") or model in ALIASES:
        if channels not in (1, 3):
            raise ValueError(f"{name} is for images of 1 or 3 channels, not {channels}")
        model, own_size = ALIASES.get(model, (model.removeprefix("timm:"), None))
        kind = ConvNeXtV2 if name.startswith("convnextv2") else Timm
        return kind(model, input_size or own_size, file)
    if name.endswith(".pt"):
        net, _ = load_mae(name)
    elif name.startswith("hf://") or Path(name).is_dir():
        net = MAE.from_official(name)
    else:
        close = nearest(name, ["pixels", "mae", *ALIASES])
        raise ValueError(f"unknown encoder {name!r}{close}; see features.py for what there is")
    if (net.config["channels"], net.config["size"]) != (channels, size):
        made_for = f"{net.config['channels']} x {net.config['size']}^2"
        raise ValueError(f"{name} is for images of {made_for}, not {channels} x {size}^2")
    del net.bridge, net.ups, net.out, net.head  # the decoder takes memory and no part
    return net


class Encoder(nn.Module):
    """Frozen encoders as one function, images [B, C, H, W] in [-1, 1] -> {name: [B, l, C]}.

    Gradients reach the images. spec: names separated by commas, see the top of this file; channels,
    size: of the images; pools, windows: of pixels(); with_edges: those of edges(), too; input_size:
    of timm's models, instead of their own; dtype: of the networks on CUDA. Raises ValueError with
    one line.
    """

    def __init__(
        self,
        spec,
        channels,
        size,
        pools=(),
        windows=(),
        with_edges=False,
        input_size=None,
        device="cpu",
        dtype=torch.bfloat16,
    ):
        super().__init__()
        self.names = [name for name in spec.split(",") if name not in ("pixels", "")]
        self.nets = nn.ModuleList(build(name, channels, size, input_size) for name in self.names)
        self.pools, self.windows, self.with_edges = pools, windows, with_edges
        # what does not fit the image size raises now, not in the first step
        self.of_pixels(torch.zeros(1, channels, size, size))
        self.requires_grad_(False).eval().to(device)
        if torch.device(device).type == "cuda":
            # float32 would keep small steps of the weights, and these take none. On a CPU bf16 and
            # channels_last are slower.
            for net in self.nets:
                if isinstance(net, ConvNeXtV2):
                    continue  # its standard deviations want float32, as officially
                net = net.net if isinstance(net, Timm) else net
                net.to(dtype=dtype, memory_format=torch.channels_last)

    def of_pixels(self, images):
        feats = pixels(images, self.pools, self.windows)
        return feats | edges(images) if self.with_edges else feats

    def forward(self, images):
        feats = self.of_pixels(images)
        for name, net in zip(self.names, self.nets, strict=True):
            for key, f in multiscale(net.features(images)).items():
                feats[f"{name}.{key}"] = f
        return feats

    @torch.no_grad()
    def vector(self, images):
        """One vector [B, C] per image, to compare images by: the mean of the last network's last
        map, or pooled_pixels() if there is none."""
        if not self.nets:
            return pooled_pixels(images)
        feats = self.nets[-1].features(images)
        if "global_mean" in feats:  # of ConvNeXtV2
            return feats["global_mean"].float().flatten(1)
        maps = [f for f in feats.values() if f.ndim == 4]
        return maps[-1].float().mean((2, 3))
