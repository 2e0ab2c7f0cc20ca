"""Scores generators of MNIST or Fashion-MNIST by a small classifier that no recipe trains on.

FD is the Fréchet distance of its 64 features to those of the test images. unsure: how many of
1,000 samples get no class a probability of one half.
$ python -m tools.judge out.pt other.pt --dataset fashion
"""

import argparse
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import fid
import model


class Classifier(nn.Sequential):
    """Images [B, 1, 28, 28] -> logits [B, 10]; body: -> features [B, 64]."""

    def __init__(self):
        super().__init__()
        layers = []
        for c_in, c_out in ((1, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)


@torch.no_grad()
def scores(net, images, labels, real):
    """A line on uint8 images, by uint8 real ones."""
    f = torch.cat([net.body(data.to_float(part)) for part in images.split(500)])
    f_real = torch.cat([net.body(data.to_float(part)) for part in real.split(500)])
    p = net.head(f).softmax(1)
    accuracy = (p.argmax(1) == labels).float().mean()
    unsure = 1000 * (p.amax(1) < 0.5).float().mean()
    fd = fid.frechet_distance(*fid.gaussian(f), *fid.gaussian(f_real))
    return f"FD {fd:.1f}  accuracy {accuracy:.3f}  unsure {unsure:.1f} of 1,000"


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("checkpoints", nargs="+")
    p.add_argument("--dataset", default="mnist", choices=["mnist", "fashion"])
    args = p.parse_args(argv)
    torch.manual_seed(0)
    net = Classifier()
    path = Path(f"data/judge_{args.dataset}.pt")
    if not path.exists():
        images, labels, _ = data.load(args.dataset)
        steps = 3 * (len(images) // 128)
        optimizer = torch.optim.AdamW(net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
        for _ in range(steps):
            some = torch.randint(len(images), (128,))
            F.cross_entropy(net(data.to_float(images[some])), labels[some]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        torch.save(net.state_dict(), path)
    net.load_state_dict(torch.load(path, weights_only=True))
    net.eval()
    real, label, _ = data.load(args.dataset, split="test")
    print("2,000 real images ", scores(net, real[:2000], label[:2000], real[2000:]), flush=True)
    label = torch.arange(2000) % 10
    for checkpoint in args.checkpoints:
        generator, _ = model.load(checkpoint)
        draws = torch.Generator().manual_seed(0)
        images = data.to_uint8(generator.generate(label, 1.0, draws))
        print(f"{checkpoint} ", scores(net, images, label, real), flush=True)


if __name__ == "__main__":
    main()
