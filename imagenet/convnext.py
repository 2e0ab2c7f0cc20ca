"""ConvNeXt-V2 of the authors' pixel models: train.py --encoder imagenet.convnext:ConvNeXtV2"""

import torch
from einops import rearrange

from features import Timm


class ConvNeXtV2(Timm):
    """Images [B, 1 or 3, H, W] -> {name: [B, l, C]}, by the authors' names."""

    float32 = True  # as officially, for the sake of its deviations

    def __init__(self):
        super().__init__("convnextv2_base.fcmae_ft_in22k_in1k", 224)

    def features(self, images):
        x = self.net.stem(self.resized(images))  # without ImageNet's mean and deviation
        feats = {}
        for i, stage in enumerate(self.net.stages):
            x = stage(x)
            var, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
            y = rearrange((x - mean) / (var.sqrt() + 1e-3), "b c h w -> b (h w) c")
            if i > 0:
                feats[f"convenxt_stage_{i}"] = y  # as the authors spell it
            std = (y.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
            feats[f"convenxt_stage_{i}_mean"] = y.mean(1, keepdim=True)
            feats[f"convenxt_stage_{i}_std"] = std
        # global_std is that of the last stage once more, as in the official code.
        pooled = self.net.head.norm(x.mean((2, 3), keepdim=True))
        return feats | {"global_mean": pooled.flatten(2).mT, "global_std": std}
