"""
A judge that no recipe trains on: a small classifier, trained in a minute, kept in data/.

Prints, for real test images and for each checkpoint, how often the classifier agrees with the label
that was asked for, the Frechet distance of its 64 features to those of the 10,000 test images, how
many of 1,000 samples it gives no class more than half a chance, and the deviation of a pixel within
a class.
$ python docs/judge.py --dataset mnist out.pt other.pt
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import fid
from model import DiT


class Classifier(nn.Module):
    """Images [B, 1, 28, 28] -> features [B, 64]; head: -> logits [B, 10]."""

    def __init__(self):
        super().__init__()
        layers = []
        for c_in, c_out in ((1, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        return self.body(images)


def train_classifier(images, labels, path, epochs=3, batch=128):
    torch.manual_seed(0)
    net = Classifier()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        some = torch.randint(len(images), (batch,))
        loss = F.cross_entropy(net.head(net(data.to_float(images[some]))), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.save(net.state_dict(), path)


@torch.no_grad()
def judge(net, images, labels, real):
    """A line on uint8 images; real: features of the test images."""
    x = data.to_float(images)
    f = torch.cat([net(part) for part in x.split(500)])
    p = net.head(f).softmax(1)
    right = (p.argmax(1) == labels).float().mean().item()
    unsure = 1000 * (p.amax(1) < 0.5).float().mean().item()
    distance = fid.frechet_distance(*fid.gaussian(f), *fid.gaussian(real))
    stds = [x[labels == k].flatten(1).std(0, correction=0).mean() for k in range(10)]
    std = torch.stack(stds).mean().item()
    return f"FD {distance:.1f}  accuracy {right:.3f}  unsure {unsure:.1f} of 1,000  std {std:.3f}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("ckpts", nargs="+")
    p.add_argument("--dataset", default="mnist", choices=["mnist", "fashion"])
    p.add_argument("--data_dir", default="data")
    p.add_argument("--n", type=data.positive_int, default=2000)
    args = p.parse_args()
    path = Path(args.data_dir) / f"judge_{args.dataset}.pt"
    if not path.exists():
        train_classifier(*data.load(args.dataset, args.data_dir)[:2], path)
    net = Classifier()
    net.load_state_dict(torch.load(path, weights_only=True))
    net.eval()
    test, test_labels, _ = data.load(args.dataset, args.data_dir, split="test")
    with torch.no_grad():
        real = torch.cat([net(part) for part in data.to_float(test).split(500)])
    half = judge(net, test[: args.n], test_labels[: args.n], real[args.n :])
    print(f"real {args.n:,} against the others  {half}", flush=True)
    for ckpt in args.ckpts:
        model, _ = DiT.load(ckpt)
        model.eval()
        label = torch.arange(args.n) % 10
        generator = torch.Generator().manual_seed(0)
        parts = [model.generate(part, 1.0, generator) for part in label.split(200)]
        print(f"{ckpt}  {judge(net, data.to_uint8(torch.cat(parts)), label, real)}", flush=True)


if __name__ == "__main__":
    data.run(main)
