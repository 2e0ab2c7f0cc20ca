"""
Trains a small autoencoder, so that the whole path of docs/imagenet.md runs on a laptop.

4 times smaller latents of 4 channels, as of a small AutoencoderKL of diffusers; a minute or two:
$ python docs/small_vae.py --dataset fashion --out vae/
$ python data.py encode --dataset fashion --size 32 --crops 2 --vae vae/ --out latents/
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

sys.path.insert(0, str(Path(__file__).parents[1]))
import data


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--dataset", default="fashion")
    p.add_argument("--data_dir", default="data")
    p.add_argument("--size", type=data.positive_int, default=32)
    p.add_argument("--steps", type=data.positive_int, default=600)
    p.add_argument("--out", default="vae/")
    args = p.parse_args()
    torch.manual_seed(0)
    images, labels, _ = data.load(args.dataset, args.data_dir, args.size)
    sampler = data.Sampler(images, labels, "cpu")
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 64],
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.Adam(vae.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, args.steps)
    for step in range(args.steps):
        generator = torch.Generator().manual_seed(step)
        x = sampler.batch(64, generator)[0].expand(-1, 3, -1, -1)
        posterior = vae.encode(x).latent_dist
        filled = vae.decode(posterior.sample()).sample
        error = F.l1_loss(filled, x)
        loss = error + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"{step + 1:6d}  mean error of a pixel {error.item():.4f}", flush=True)
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.sample()
    vae.register_to_config(scaling_factor=1 / latents.std().item())  # as of the SD-VAE
    vae.save_pretrained(args.out)
    print(f"{args.out}, latents of deviation 1 by a factor of {1 / latents.std().item():.3f}")


if __name__ == "__main__":
    data.run(main)
