"""The generator of "Generative Modeling via Drifting": a DiT, from noise to image in one pass.

    noise  [B, C, H, W]   Gaussian, the input image
    style  [B, 32]        integers below 64; the sum of 32 random embeddings is a discrete noise
    label  [B]            class
    alpha  [B]            guidance strength; trained on a range, so that guidance costs nothing

The architecture is that of the official JAX code, whose weights fit: see imagenet/README.md."""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

SIZES = {
    "tiny": dict(hidden_size=96, depth=3, num_heads=4, n_cls_tokens=4),  # for a CPU
    "S": dict(hidden_size=384, depth=12, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
}


@dataclass
class DiTConfig:
    input_size: int = 32  # images are square
    in_channels: int = 3
    patch_size: int = 2
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    n_cls_tokens: int = 16
    num_classes: int = 10
    noise_classes: int = 64  # codes of each style coordinate
    noise_coords: int = 32  # style coordinates
    cond_dim: int = 0  # 0: hidden_size
    noise_image: bool = True  # false: style is the only noise, and its embedding starts wide


def sinusoid(alpha, dim=256):
    """Features [B, dim] of a scalar [B]: cosines, then sines; wavelengths 2 pi to 2 pi * 10000."""
    freq = torch.exp(torch.arange(dim // 2, device=alpha.device) * (-math.log(10000) / (dim // 2)))
    angle = alpha[:, None].float() * freq
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def sincos_2d(dim, grid):
    """Fixed 2-D positions [1, grid * grid, dim], row by row; the first half encodes the column."""
    freq = 10000 ** (-torch.arange(dim // 4) / (dim / 4))
    angle = torch.arange(grid)[:, None] * freq  # [grid, dim / 4]
    line = torch.cat([angle.sin(), angle.cos()], dim=-1)  # [grid, dim / 2]
    column, row = line.repeat(grid, 1), line.repeat_interleave(grid, 0)
    return torch.cat([column, row], dim=-1).unsqueeze(0)


def rope_1d(dim, length):
    """cos and sin [2, length, dim] of the rotary embedding (rotate-half, base 10000)."""
    freq = 10000 ** (-torch.arange(0, dim, 2) / dim)
    angle = torch.outer(torch.arange(length), freq).repeat(1, 2)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x, cos, sin):
        q, k, v = rearrange(self.qkv(x), "b t (n h d) -> n b h t d", n=3, h=self.heads)
        cos, sin = cos.to(v.dtype), sin.to(v.dtype)
        q = rotate(self.q_norm(q).to(v.dtype), cos, sin)  # autocast makes norms float32,
        k = rotate(self.k_norm(k).to(v.dtype), cos, sin)  # which has no fast attention
        x = F.scaled_dot_product_attention(q, k, v)  # [B, h, T, d]
        return self.proj(rearrange(x, "b h t d -> b t (h d)"))


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = math.ceil(8 * width // 3 / 32) * 32  # as costly as an MLP of 4 width
        self.w13 = nn.Linear(width, 2 * hidden)  # w1 and w3, in one matrix product
        self.w2 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, width, heads, cond_dim):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width)
        self.adaln = nn.Linear(cond_dim, 6 * width)

    def forward(self, x, cond, cos, sin):
        modulation = self.adaln(F.silu(cond)).unsqueeze(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Generator(nn.Module):
    """What generators have in common; what else they need stands above train.build_net()."""

    def draw(self, n, g):
        """noise and style of forward() for n images, from a torch.Generator g, on its device."""
        c = self.config
        how = dict(generator=g, device=g.device)
        noise = torch.randn(n, c.in_channels, c.input_size, c.input_size, **how)
        return noise, torch.randint(c.noise_classes, (n, c.noise_coords), **how)

    @torch.no_grad()
    def generate(self, label, alpha, g):
        """Images, not clamped, of classes label [B], at guidance alpha, a number or [B]."""
        draws = [self.draw(1, g) for _ in label]  # image i is the same in any batch
        draws = [torch.cat(d).to(label.device) for d in zip(*draws, strict=True)]
        alpha = torch.as_tensor(alpha, dtype=torch.float32, device=label.device)
        return self(*draws, label, alpha.expand(len(label)))

    def matrices(self):
        """The parameters that Muon may train."""
        return []


class DiT(Generator):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.input_size % c.patch_size:
            raise ValueError(f"images of {c.input_size} pixels have no patches of {c.patch_size}")
        width = c.hidden_size
        cond = c.cond_dim or width
        patch_dim = c.in_channels * c.patch_size**2
        self.label_embed = nn.Embedding(c.num_classes, cond)
        self.style_embed = nn.Embedding(c.noise_coords * c.noise_classes, cond)
        self.alpha_embed = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.alpha_norm = nn.RMSNorm(cond, eps=1e-6)
        self.patch_embed = nn.Linear(patch_dim, width)
        self.pos_embed = nn.Parameter(sincos_2d(width, c.input_size // c.patch_size))  # [1, HW, D]
        self.cls_proj = nn.Linear(cond, width)
        self.cls_embed = nn.Parameter(torch.empty(1, c.n_cls_tokens, width))
        self.blocks = nn.ModuleList(Block(width, c.num_heads, cond) for _ in range(c.depth))
        self.final_norm = nn.RMSNorm(width, eps=1e-6)
        self.final_adaln = nn.Linear(cond, 2 * width)
        self.final_proj = nn.Linear(width, patch_dim)
        tokens = c.n_cls_tokens + self.pos_embed.shape[1]  # class tokens first
        rope = rope_1d(width // c.num_heads, tokens)
        self.register_buffer("rope", rope, persistent=False)  # [2, T, d], not in checkpoints
        self.init_weights()

    def init_weights(self):
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                for w in m.weight.chunk(2 if name.endswith("w13") else 1):
                    nn.init.xavier_uniform_(w)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Embedding):
                wide = {"style_embed": 0.2, "label_embed": 0.5}[name]  # distinct from the start
                nn.init.normal_(m.weight, std=0.02 if self.config.noise_image else wide)
        for m in (self.alpha_embed[0], self.alpha_embed[2]):
            nn.init.normal_(m.weight, std=0.02)
        nn.init.normal_(self.cls_embed, std=0.02)
        # adaLN-zero: every block starts as the identity, and the first image is zero
        for m in [b.adaln for b in self.blocks] + [self.final_adaln, self.final_proj]:
            nn.init.zeros_(m.weight)

    def condition(self, style, label, alpha):
        """What modulates every block [B, cond_dim]: class + styles + 0.02 * normalised guidance."""
        codes = self.style_embed.num_embeddings
        first = torch.arange(0, codes, self.config.noise_classes, device=style.device)
        styles = self.style_embed(style + first).sum(1)  # each coordinate has a table of its own
        guidance = self.alpha_norm(self.alpha_embed(sinusoid(alpha)))
        return self.label_embed(label) + styles + 0.02 * guidance

    def forward(self, noise, style, label, alpha):
        """Images [B, C, H, W], about -1 to 1, not clamped; equal arguments give equal images."""
        c = self.config
        p = c.patch_size
        cond = self.condition(style, label, alpha)  # [B, D]
        x = rearrange(c.noise_image * noise, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
        x = self.patch_embed(x) + self.pos_embed  # [B, HW, D]
        cls = self.cls_proj(cond).unsqueeze(1) + self.cls_embed  # [B, n, D]
        x = torch.cat([cls, x], dim=1)  # [B, n + HW, D]
        for block in self.blocks:
            x = block(x, cond, *self.rope)
        shift, scale = self.final_adaln(F.silu(cond)).unsqueeze(1).chunk(2, dim=-1)
        x = self.final_norm(x) * (1 + scale) + shift
        x = self.final_proj(x)[:, c.n_cls_tokens :]  # [B, HW, ppC]
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=c.input_size // p)

    def matrices(self):
        named = self.blocks.named_parameters()
        return [p for name, p in named if p.ndim == 2 and "adaln" not in name]

    def compile(self, **how):
        """By torch.compile, block by block: as they are alike, they are compiled once."""
        for block in self.blocks:
            block.compile(**how)


def build(config):
    """The generator of a checkpoint's config, a dictionary: here another network may be named."""
    return DiT(DiTConfig(**config))


def usable(device):
    """A torch.device, or ValueError if this machine or this build of torch has no such device."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {device}: {str(error)[:60]}") from None


def load(path, build=build, weights="ema"):
    """build(config) with these weights of a checkpoint, and the checkpoint. Raises ValueError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        net = build(checkpoint["config"])
        net.load_state_dict(checkpoint[weights])
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}") from None
    except Exception as error:  # what torch raises for damaged files has no type in common
        raise ValueError(f"{path} is damaged or of another kind ({error!r})") from None
    return net, checkpoint
