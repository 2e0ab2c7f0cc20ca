"""A network learns two sets of 2-D points by drifting, in half a minute of a CPU. Draws drift.gif.

$ python toy.py
$ python toy.py --floor 1e-6   # the official floor: all samples are pulled to the mean of the data
"""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

from drift import distance, drift_field, drift_loss


def train(data, steps, iters, floor):
    """Trains an MLP from noise to 2-D points; -> it, and a film of (samples, data, drift)."""
    layers = [nn.Linear(8, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128)]
    net = nn.Sequential(*layers, nn.SiLU(), nn.Linear(128, 2))
    optimizer = torch.optim.Adam(net.parameters(), 2e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    noise, film = torch.randn(400, 8), []
    shown = {round((steps - 1) * (i / 39) ** 2) for i in range(40)}  # most motion is early
    for step in range(steps):
        if step in shown:
            x, y = net(noise).detach(), data(400)
            tau = 0.05 * distance(x, y).mean()
            film.append((x, y, drift_field(x, y, x, tau, mask_self=True, iters=iters, floor=floor)))
        x, y = net(torch.randn(256, 8)), data(256)
        loss, _ = drift_loss(x[None], y[None], iters=iters, floor=floor)  # one group
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net, film


def swiss_roll(n):
    t = 1.5 * torch.pi * (1 + 2 * torch.rand(n))
    return torch.stack([t * t.cos(), t * t.sin()], dim=1) / 15 + 0.02 * torch.randn(n, 2)


def checkerboard(n):
    """8 of the 16 squares of [-1, 1]^2."""
    column = torch.randint(4, (n,))
    row = 2 * torch.randint(2, (n,)) + column % 2
    return (torch.stack([column, row], dim=1) + torch.rand(n, 2)) / 2 - 1


def sliced_wasserstein(a, b):
    """Mean Wasserstein-1 distance of the projections of a [N, 2] and b [N, 2] on random lines."""
    line = F.normalize(torch.randn(2, 200), dim=0)
    gap = (a @ line).sort(dim=0).values - (b @ line).sort(dim=0).values
    return gap.abs().mean().item()


def save_films(films, path, size=300):
    """One GIF of the films side by side: real points grey, samples orange, their drift blue."""
    frames = []
    for moment in zip(*films, strict=True):
        frame = Image.new("RGB", (size * len(films), size), "white")
        pen = ImageDraw.Draw(frame)
        for panel, (x, y, V) in enumerate(moment):
            V = V / V.norm(dim=1).mean().clamp(min=1e-6) * 0.1  # mean length 0.1, for display only
            x, y, tip = ((p.clamp(-1.2, 1.2) + 1.2) / 2.4 * size for p in (x, y, x + V))
            left = torch.tensor([panel * size, 0])
            x, y, tip = (x + left).tolist(), (y + left).tolist(), (tip + left).tolist()
            for a, b in y:
                pen.rectangle((a - 1, b - 1, a, b), fill="#c8c8c8")
            for start, end in zip(x[::4], tip[::4], strict=True):
                pen.line((*start, *end), fill="#3060c0")
            for a, b in x:
                pen.rectangle((a - 1, b - 1, a + 1, b + 1), fill="#e07020")
        frames.append(frame.quantize(8))
    times = [80] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in dict(steps=1500, iters=1, floor=0.0, out="drift.gif").items():
        p.add_argument(f"--{name}", type=type(default), default=default)
    args = p.parse_args(argv)
    torch.set_flush_denormal(True)  # exp() of far pairs gives denormals, slow on some CPUs
    torch.manual_seed(0)
    films = []
    for data in (swiss_roll, checkerboard):
        net, film = train(data, args.steps, args.iters, args.floor)
        films.append(film)
        with torch.no_grad():
            pairs = [(net(torch.randn(2000, 8)), data(2000), data(2000)) for _ in range(10)]
        ratio = sum(sliced_wasserstein(x, y) for x, y, _ in pairs)
        ratio /= sum(sliced_wasserstein(z, y) for _, y, z in pairs)
        print(f"{data.__name__}: sliced Wasserstein distance to data / between data {ratio:.2f}")
    save_films(films, args.out)


if __name__ == "__main__":
    main()
