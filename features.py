"""
Images to named feature vectors: the spaces in which the drift is measured.

    images [B, C, H, W] in [-1, 1]  ->  {name: [B, L, C]}        L locations, C channels

Every name is a drift problem of its own: it has its own scale, and the losses of all names are added. Nothing here is
needed to sample. This file has `pixels`, which needs no network; frozen encoders will be functions of the same form.
"""
import torch
import torch.nn.functional as F
from einops import rearrange


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


def frechet_distance(a, b):
    """Frechet distance of two Gaussians fitted to a [N, C] and b [M, C], in float64 (Dowson and Landau, 1982).

    |mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)). Not zero for two samples of one distribution:
    it depends on N and M, so that only values of equal N, M and feature compare.
    """
    a, b = a.cpu().double(), b.cpu().double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    val, vec = torch.linalg.eigh(cov_a)
    root = vec * val.clamp(min=0).sqrt() @ vec.T                                                       # cov_a^(1/2)
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()     # trace of (cov_a cov_b)^(1/2)
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * mixed).item()
