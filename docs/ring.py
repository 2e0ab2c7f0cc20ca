"""
Drifting with a number as the condition, on a toy whose answer is known; docs/condition.md says why.

The points of condition c lie on a ring of radius 0.3 + 0.6 c. A quarter of the ring is missing, and
the gap goes round once while c goes from 0 to 1. Data: 20,000 pairs (c, point), each c different.

Prints, for each way to make the groups of drift_loss(), the sliced Wasserstein distance to the real
points of 9 conditions that are not in the data, in units of that of two real sets: the mean and the
worst. Draws the points: a row per way, a column per condition, real grey and generated orange.
$ python docs/ring.py
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from drift import drift_loss, sliced_wasserstein

GROUPS, SAMPLES = 16, 64  # of a step, except of joint()
HELD_OUT = torch.linspace(0.05, 0.95, 9)


def ring(c):
    """A real point [..., 2] of each condition c [...]."""
    angle = 2 * math.pi * (c + 0.75 * torch.rand_like(c))
    radius = 0.3 + 0.6 * c + 0.03 * torch.randn_like(c)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)


def generate(net, c):
    """A generated point [..., 2] of each condition c [...]."""
    return net(torch.cat([torch.randn(*c.shape, 8), 4 * c.unsqueeze(-1) - 2], dim=-1))


def draw_groups(n, width):
    """Of n sorted data, centres [GROUPS, 1], and of the width nearest to each [GROUPS, SAMPLES]."""
    centre = torch.randint(n, (GROUPS, 1))
    start = (centre - width // 2).clamp(0, n - width)
    share = width // SAMPLES  # one datum of every so many, and all of them if width is SAMPLES
    return centre, start + torch.arange(SAMPLES) * share + torch.randint(share, (GROUPS, SAMPLES))


def neighbours(net, c, y, width):
    """The positives are near in the condition, and each sample has the condition of one of them."""
    _, near = draw_groups(len(c), width)
    return drift_loss(generate(net, c[near]), y[near])[0]


def neighbours_of_centre(net, c, y, width):
    """The same positives, but the samples of a group all have the condition of its centre."""
    centre, near = draw_groups(len(c), width)
    return drift_loss(generate(net, c[centre].expand(-1, SAMPLES)), y[near])[0]


def one_positive(net, c, y, samples):
    """A group is one datum, the only positive, and samples of exactly its condition."""
    i = torch.randint(len(c), (GROUPS * SAMPLES // samples, 1))
    return drift_loss(generate(net, c[i].expand(-1, samples)), y[i])[0]


def joint(net, c, y, weight, samples=512):
    """One group of all conditions, of vectors [x, weight * c]: only x comes from the network."""
    i, j = torch.randint(len(c), (2, samples))  # other conditions than those of the positives
    x = torch.cat([generate(net, c[i]), weight * c[i, None]], dim=1)
    real = torch.cat([y[j], weight * c[j, None]], dim=1)
    return drift_loss(x[None], real[None])[0]


WAYS = {  # name: function, its last argument
    "64 neighbours": (neighbours, 64),
    "4,096 neighbours": (neighbours, 4096),
    "4,096 neighbours, all samples at the centre": (neighbours_of_centre, 4096),
    "one positive, 64 samples": (one_positive, 64),
    "one group of 512, [x, 5 c]": (joint, 5),
    "one group of 512, c left out": (joint, 0),
}


def train(way, argument, c, y, steps):
    layers = [torch.nn.Linear(9, 128)]
    for width in (128, 128, 2):
        layers += [torch.nn.SiLU(), torch.nn.Linear(128, width)]
    net = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        loss = way(net, c, y, argument)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def distances(points):
    """From 2,000 of points(c) to 2,000 real points, for each held-out condition: means of 5."""
    conditions = [value.expand(2000) for value in HELD_OUT]
    five = [[sliced_wasserstein(points(c), ring(c)) for c in conditions] for _ in range(5)]
    return torch.tensor(five).mean(0)


@torch.no_grad()
def draw(nets, path, size=140):
    shown = HELD_OUT[::2]
    page = Image.new("RGB", (size * len(shown), (size + 16) * len(nets)), "white")
    pen = ImageDraw.Draw(page)
    for row, (name, net) in enumerate(nets.items()):
        top = row * (size + 16)
        pen.text((4, top + 2), name, fill="black")
        for column, value in enumerate(shown):
            corner = torch.tensor([column * size, top + 16])
            pen.text((column * size + 4, top + size), f"c {value:.3f}", fill="black")
            c = value.expand(500)
            for points, colour in ((ring(c), "#b8b8b8"), (generate(net, c), "#e07020")):
                pixels = (points.clamp(-1.05, 1.05) / 2.1 + 0.5) * size + corner
                for a, b in pixels.tolist():
                    pen.rectangle((a - 1, b - 1, a, b), fill=colour)
    page.quantize(8).save(path, optimize=True)


def main():
    p = argparse.ArgumentParser(description="Ways to condition drifting on a number, on a toy.")
    p.add_argument("--steps", type=int, default=800)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="ring.png")
    args = p.parse_args()
    torch.set_flush_denormal(True)  # as exp() of far pairs gives, slow on some CPUs
    torch.manual_seed(args.seed)
    floor = distances(ring)
    nets = {}
    for name, (way, argument) in WAYS.items():
        torch.manual_seed(args.seed)
        c = torch.rand(20_000).sort().values
        y = ring(c)
        began = time.time()
        nets[name] = train(way, argument, c, y, args.steps)
        seconds = time.time() - began
        ratio = distances(partial(generate, nets[name])) / floor
        line = f"{name:44s} {ratio.mean():5.2f}, worst {ratio.max():5.2f}, {seconds:.0f} s"
        print(line, flush=True)
    draw(nets, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
