"""
The log of a run: out.jsonl, one JSON object a line, and its curves, out.png.

    first line    torch, device, commit, and the arguments
    other lines   step, images, seconds, and what was measured then: drift_0.02 and so on, scale,
                  the same of each encoder where there are several, grad_norm, lr, images_per_s,
                  memory_gb; the scores of samples; real_..., what real images reach

Several runs in one picture, log.png
$ python log.py out.jsonl other.jsonl
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import data

PANELS = {  # of the picture: the title, and beginnings of the names in it
    "mean square of the raw drift": ["drift_"],
    "Frechet distance": ["fd", "fid"],
    "share of samples, deviation": ["acc", "std", "copies"],
    "images per second": ["images_per_s"],
}


def commit():
    """The commit of this code, with -dirty if it was changed since; None if there is no git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        here = Path(__file__).parent
        found = subprocess.run(command, cwd=here, capture_output=True, text=True)
        return found.stdout.strip() or None
    except OSError:
        return None


def read(path):
    """The lines of a log as dictionaries, up to one that was cut short; [] if there is no file.

    Raises ValueError if it is another file.
    """
    lines = []
    try:
        for line in Path(path).read_text(errors="replace").splitlines():
            lines.append(dict(json.loads(line)))
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, RecursionError):
        pass  # cut short, or not of us: see below
    if not lines or "torch" not in lines[0]:
        raise ValueError(f"{path} is no log of train.py")
    return lines


class Log:
    """Appends to the log of a run; on all ranks but the first it does nothing.

    first: what the first line says. step: of the checkpoint that the run goes on from, 0 if it is
    new; what the log says of later steps is cut off. same: names in `first` by which the run knows
    its own log. project: of Weights & Biases, which keeps what it was sent first of a step. Raises
    ValueError for the log of another run. The file is not touched before there is something to say.
    """

    def __init__(self, path, first, step, same, project=None):
        self.path = Path(path)
        self.seconds = 0  # before the run was resumed
        self.wandb = None
        if data.rank() > 0:
            return
        lines = read(self.path)
        begun = any("images" in line for line in lines[1:])  # else a run that did not make a step
        for name in same if begun else ():
            if lines[0].get(name) != first[name]:
                differs = f"{name} {lines[0].get(name)}, not {first[name]}"
                how = "name another --out, or move it away"
                raise ValueError(f"{self.path} is the log of another run, with {differs}: {how}")
        self.kept = []
        for line in lines if step else ():
            if line.get("step", 0) > step:
                break
            self.kept.append(line)
            self.seconds = line.get("seconds", self.seconds)
        self.kept = self.kept or [first]
        if project:
            self.wandb = start_wandb(project, self.kept[0])

    def write(self, **numbers):
        """Adds a line. Without room on the disk it is left out, and said so."""
        if data.rank() > 0:
            return
        if "seconds" in numbers:
            numbers["seconds"] += self.seconds
        for name, number in numbers.items():
            if isinstance(number, float):  # JSON has no NaN, and nobody reads 17 digits
                numbers[name] = float(f"{number:.6g}") if math.isfinite(number) else None
        if self.wandb:
            self.wandb.log(numbers, step=numbers["step"])
        size = None
        try:
            if self.kept:
                with data.whole(self.path) as file:
                    for line in self.kept:
                        file.write(json.dumps(line).encode() + b"\n")
                self.kept = []
            with open(self.path, "ab") as file:
                size = file.tell()
                file.write(json.dumps(numbers).encode() + b"\n")
        except OSError as error:
            print(f"cannot write {self.path} ({error})", file=sys.stderr, flush=True)
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.path, size)  # no half a line

    def draw(self):
        """The curves so far, beside the log."""
        if data.rank() == 0:
            try:
                draw([self.path], self.path.with_suffix(".png"))
            except ValueError as error:  # somebody has changed it
                print(error, file=sys.stderr, flush=True)
            gc.collect()  # parts of a figure hold one another, and some 20 MB


def start_wandb(project, first):
    """The run of Weights & Biases that goes with a log; ValueError with one line."""
    try:
        import wandb

        # The same run again where it is resumed, and WANDB_MODE=offline needs no network.
        return wandb.init(project=project, id=first["run"], config=first, resume="allow")
    except ImportError:
        raise ValueError("--wandb needs pip install wandb") from None
    except Exception as error:  # network, key, settings: each raises its own
        raise ValueError(f"--wandb {project}: {data.one_line(error)}") from None


def draw(paths, out):
    """The curves of logs, against the generated images; dashed is what real images reach.

    Without matplotlib, or without room on the disk, a line instead.
    """
    if not find_spec("matplotlib"):
        print(f"no {out}: pip install matplotlib", flush=True)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (title, starts) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for path in paths:
            lines = read(path)[1:]
            seen = [line for line in lines if "images" in line]
            names = dict.fromkeys(name for line in seen for name in line)
            for name in (name for name in names if name.startswith(tuple(starts))):
                points = [(line["images"], line[name]) for line in seen if name in line]
                label = name if len(paths) == 1 else f"{path} {name}"
                images, values = zip(*points, strict=True)
                [curve] = axes.plot(images, values, label=label)
                for real in {line.get("real_" + name) for line in lines} - {None}:
                    axes.axhline(real, color=curve.get_color(), linestyle="--", linewidth=0.8)
        axes.set(title=title, xlabel="generated images")
        if "share" not in title and "second" not in title:
            axes.set_yscale("log")
        if "drift" in title:
            axes.set_ylim(bottom=1e-4)  # at first everything is far from everything
        if axes.lines:
            axes.legend(fontsize="small")
    try:
        with data.whole(out) as file:
            figure.savefig(file, format="png", dpi=100)
    except OSError as error:
        print(f"cannot write {out} ({error})", file=sys.stderr, flush=True)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("logs", nargs="+", help="out.jsonl of train.py")
    p.add_argument("--out", default="log.png", help="picture")
    args = p.parse_args()
    for path in args.logs:
        if not Path(path).exists():
            raise ValueError(f"there is no log {path}: train.py writes one")
    draw(args.logs, args.out)


if __name__ == "__main__":
    data.run(main)
