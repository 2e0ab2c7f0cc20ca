"""
The generator of "Generative Modeling via Drifting": a DiT that maps noise to an image in one forward pass.

    noise  [B, C, H, W]    Gaussian, the input image
    style  [B, 32]         integers below 64; the sum of 32 random embeddings is a second, discrete noise
    label  [B]             class
    alpha  [B]             guidance strength; the network is trained on a range of them, so guidance costs nothing

There is no time step and no second pass. The architecture is that of the official JAX code, so that its weights fit:
$ python sample.py --ckpt hf://pixel_B_sota --classes 207 360 --n 8
"""
import math
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

SIZES = {  # name: (width, layers, heads, class tokens)
    "tiny": (96, 3, 4, 4),      # for digits on a laptop
    "S": (384, 12, 6, 16),
    "B": (768, 12, 12, 16),
    "L": (1024, 24, 16, 16),
}
OFFICIAL_CONFIG = dict(mlp_ratio=4.0, use_qknorm=True, use_swiglu=True, use_rope=True, use_rmsnorm=True)
OFFICIAL_NAMES = {  # module of this file: of the official code, of a block below LightningDiT_0/blocks_i
    "label_embed": "Embed_0", "alpha_norm": "RMSNorm_0",
    "alpha_embed.0": "TimestepEmbedder_0/TorchLinear_0", "alpha_embed.2": "TimestepEmbedder_0/TorchLinear_1",
    "patch_embed": "LightningDiT_0/TorchLinear_0", "cls_proj": "LightningDiT_0/TorchLinear_1",
    "final_norm": "LightningDiT_0/FinalLayer_0/RMSNorm_0", "final_adaln": "LightningDiT_0/FinalLayer_0/TorchLinear_0",
    "final_proj": "LightningDiT_0/FinalLayer_0/TorchLinear_1",
    "norm1": "RMSNorm_0", "norm2": "RMSNorm_1", "adaln": "TorchLinear_0", "attn.qkv": "Attention_0/TorchLinear_0",
    "attn.q_norm": "Attention_0/q_norm", "attn.k_norm": "Attention_0/k_norm", "attn.proj": "Attention_0/TorchLinear_1",
    "mlp.w1": "SwiGLUFFN_0/TorchLinear_0", "mlp.w3": "SwiGLUFFN_0/TorchLinear_1", "mlp.w2": "SwiGLUFFN_0/TorchLinear_2",
}


@dataclass
class DiTConfig:
    input_size: int = 32        # images are square
    in_channels: int = 3
    patch_size: int = 2
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    n_cls_tokens: int = 16
    num_classes: int = 10
    noise_classes: int = 64     # codes of each style coordinate
    noise_coords: int = 32      # style coordinates
    cond_dim: int = 0           # 0: hidden_size

    @classmethod
    def named(cls, name, **kwargs):
        """The configuration of a size in SIZES; input_size, in_channels, patch_size and num_classes as keywords."""
        width, depth, heads, tokens = SIZES[name]
        return cls(hidden_size=width, depth=depth, num_heads=heads, n_cls_tokens=tokens, **kwargs)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)                             # [B, h, T, d]
        return self.proj(rearrange(x, "b h t d -> b t (h d)"))


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = math.ceil(int(4 * width * 2 / 3) / 32) * 32    # 2/3: three matrices cost as much as an MLP's two
        self.w1 = nn.Linear(width, hidden)
        self.w3 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, width, heads, cond_dim):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width)
        self.adaln = nn.Linear(cond_dim, 6 * width)

    def forward(self, x, cond, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(F.silu(cond)).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.input_size % c.patch_size:
            raise ValueError(f"images of {c.input_size} pixels cannot be cut into patches of {c.patch_size}: "
                             "choose a patch size that divides the image size")
        width, cond_dim, patch_dim = c.hidden_size, c.cond_dim or c.hidden_size, c.in_channels * c.patch_size**2
        self.label_embed = nn.Embedding(c.num_classes, cond_dim)
        self.style_embed = nn.EmbeddingBag(c.noise_coords * c.noise_classes, cond_dim, mode="sum")
        self.alpha_embed = nn.Sequential(nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))
        self.alpha_norm = nn.RMSNorm(cond_dim, eps=1e-6)

        self.patch_embed = nn.Linear(patch_dim, width)
        self.pos_embed = nn.Parameter(sincos_2d(width, c.input_size // c.patch_size))                     # [1, HW, D]
        self.cls_proj = nn.Linear(cond_dim, width)
        self.cls_embed = nn.Parameter(torch.empty(1, c.n_cls_tokens, width))
        self.blocks = nn.ModuleList(Block(width, c.num_heads, cond_dim) for _ in range(c.depth))
        self.final_norm = nn.RMSNorm(width, eps=1e-6)
        self.final_adaln = nn.Linear(cond_dim, 2 * width)
        self.final_proj = nn.Linear(width, patch_dim)
        tokens = c.n_cls_tokens + self.pos_embed.shape[1]
        cos, sin = rope_1d(width // c.num_heads, tokens)
        self.register_buffer("rope_cos", cos, persistent=False)                                                # [T, d]
        self.register_buffer("rope_sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
            elif isinstance(m, (nn.Embedding, nn.EmbeddingBag)):
                nn.init.normal_(m.weight, std=0.02)
        for m in (self.alpha_embed[0], self.alpha_embed[2]):
            nn.init.normal_(m.weight, std=0.02)
        nn.init.normal_(self.cls_embed, std=0.02)
        for m in [b.adaln for b in self.blocks] + [self.final_adaln, self.final_proj]:
            nn.init.zeros_(m.weight)  # adaLN-zero: every block starts as the identity, the first image is zero

    def condition(self, style, label, alpha):
        """What every block is modulated by: class + sum of styles + 0.02 * normalised guidance, [B, cond_dim]."""
        first = torch.arange(0, self.style_embed.num_embeddings, self.config.noise_classes, device=style.device)
        styles = self.style_embed(style + first)                            # each coordinate has a table of its own
        return self.label_embed(label) + styles + 0.02 * self.alpha_norm(self.alpha_embed(sinusoid(alpha)))

    def forward(self, noise, style, label, alpha):
        """noise [B, C, H, W], style [B, 32], label [B], alpha [B] -> images [B, C, H, W], about -1 to 1, not clamped.

        All randomness is in the arguments: the same arguments give the same images.
        """
        c = self.config
        cond = self.condition(style, label, alpha)                                                             # [B, D]
        x = rearrange(noise, "b c (h p) (w q) -> b (h w) (p q c)", p=c.patch_size, q=c.patch_size)
        x = self.patch_embed(x) + self.pos_embed                                                           # [B, HW, D]
        cls = self.cls_proj(cond).unsqueeze(1) + self.cls_embed                                             # [B, n, D]
        x = torch.cat([cls, x], dim=1)                                                                  # [B, n + HW, D]
        for block in self.blocks:
            x = block(x, cond, (self.rope_cos, self.rope_sin))
        shift, scale = self.final_adaln(F.silu(cond)).unsqueeze(1).chunk(2, dim=-1)
        x = self.final_proj(modulate(self.final_norm(x), shift, scale))[:, c.n_cls_tokens:]              # [B, HW, ppC]
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", p=c.patch_size, q=c.patch_size,
                         h=c.input_size // c.patch_size)

    def draw(self, n, generator):
        """The two noises of n images, drawn from a torch.Generator on its device: noise and style of forward()."""
        c = self.config
        noise = torch.randn(n, c.in_channels, c.input_size, c.input_size, generator=generator, device=generator.device)
        return noise, torch.randint(c.noise_classes, (n, c.noise_coords), generator=generator, device=generator.device)

    @torch.no_grad()
    def generate(self, label, alpha, generator):
        """Images [B, C, H, W], not clamped, of classes label [B], at guidance alpha (number or [B]).

        Image i is the same in any batch: it takes the next draw of the generator, alone.
        """
        draws = [self.draw(1, generator) for _ in label]
        noise, style = (torch.cat(d).to(label.device) for d in zip(*draws))
        alpha = torch.as_tensor(alpha, dtype=torch.float32, device=label.device).expand(len(label))
        return self(noise, style, label, alpha).float()

    @classmethod
    def load(cls, source):
        """A generator on the CPU, and the arguments that it was trained with, {} if unknown.

        source: FILE.pt of train.py, whose EMA weights are taken, or what from_official() takes. Raises ValueError or
        OSError with one line.
        """
        if str(source).startswith("hf://") or Path(source).is_dir():
            return cls.from_official(source), {}
        try:
            checkpoint = load_checkpoint(source)
            model = cls(DiTConfig(**checkpoint["config"]))
            model.load_state_dict(checkpoint["ema"])
            return model, checkpoint["args"]
        except FileNotFoundError:
            raise ValueError(f"there is no checkpoint {source}: python train.py writes out.pt") from None
        except Exception as error:  # what torch.load raises for a damaged file has no type in common
            raise ValueError(f"{source} is damaged or not a checkpoint of train.py ({type(error).__name__})") from None

    @classmethod
    def from_official(cls, source):
        """The authors' generator: hf://NAME, downloaded once, or a local folder. Raises ValueError or OSError."""
        import official                                                   # here: the rest of this file needs no other

        def build(config):
            fixed = OFFICIAL_CONFIG | {"out_channels": config["in_channels"]}
            other = [name for name, value in fixed.items() if config.get(name, value) != value]
            if other:
                raise ValueError(f"this one has no other {', '.join(other)}")
            return cls(DiTConfig(**{name: config[name] for name in DiTConfig.__dataclass_fields__}))

        model = official.load(source, "gen", build)
        c = model.config
        tokens = c.n_cls_tokens + model.pos_embed.shape[1]
        model.rope_cos, model.rope_sin = rope_1d(c.hidden_size // c.num_heads, tokens)                 # not in the file
        return model

    def official_name(self, name):
        """How the authors' files call parameter `name`: its keys, parts of one table if several, and order of axes."""
        if name == "style_embed.weight":
            return [f"noise_embeds_{i}/embedding" for i in range(self.config.noise_coords)], (0, 1)
        if name in ("pos_embed", "cls_embed"):
            return [f"LightningDiT_0/{name}"], (0, 1, 2)
        module, leaf = name.rsplit(".", 1)
        where = ""
        if module.startswith("blocks."):
            _, i, module = module.split(".", 2)
            where = f"LightningDiT_0/blocks_{i}/"
        where += OFFICIAL_NAMES[module]
        if "TorchLinear" in where:
            return [f"{where}/Dense_0/{'kernel' if leaf == 'weight' else leaf}"], (1, 0) if leaf == "weight" else (0,)
        return [f"{where}/{'embedding' if 'Embed' in where else leaf}"], (0, 1) if "Embed" in where else (0,)

    def resize_classes(self, n):
        """Gives the class table n rows, each the mean of the old ones, as the new classes are not the old ones."""
        mean = self.label_embed.weight.detach().mean(0, keepdim=True)
        self.label_embed = nn.Embedding.from_pretrained(mean.repeat(n, 1), freeze=False)
        self.config = replace(self.config, num_classes=n)


def load_checkpoint(path):
    """What train.py has saved, on the CPU; first compares every byte with its checksum, as torch.load does not."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise ValueError(f"{path} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def sinusoid(alpha, dim=256):
    """Features [B, dim] of a scalar [B]: cosines, then sines, at wavelengths from 2 pi to 2 pi * 10000."""
    freq = torch.exp(torch.arange(dim // 2, device=alpha.device) * (-math.log(10000) / (dim // 2)))
    angle = alpha[:, None].float() * freq
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def sincos_2d(dim, grid):
    """Fixed 2-D positions [1, grid * grid, dim], row by row; the first half of the channels encodes the column."""
    freq = 10000 ** (-torch.arange(dim // 4) / (dim / 4))
    angle = torch.arange(grid)[:, None] * freq                                                           # [grid, dim/4]
    line = torch.cat([angle.sin(), angle.cos()], dim=-1)                                                 # [grid, dim/2]
    both = torch.cat([line.repeat(grid, 1), line.repeat_interleave(grid, 0)], dim=-1)                      # column, row
    return both.unsqueeze(0)


def rope_1d(dim, length):
    """cos and sin [length, dim] of the rotary embedding (rotate-half, base 10000)."""
    freq = 10000 ** (-torch.arange(0, dim, 2) / dim)
    angle = torch.outer(torch.arange(length), freq).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin
