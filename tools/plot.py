"""Draws logs of train.py against the generated images. A dashed line is what real images reach.

$ python -m tools.plot a.jsonl b.jsonl --out curves.png
"""

import argparse
import json
import sys
from pathlib import Path

PANELS = [("drift_", "log"), ("fd", "log"), (("acc", "std"), "linear"), ("images_per_s", "linear")]


def main(argv=None):
    from matplotlib.figure import Figure  # here: it may be missing

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("logs", nargs="+", help="out.jsonl of train.py")
    p.add_argument("--out", default="curves.png")
    args = p.parse_args(argv)
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, (beginning, scale) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        axes.set(xlabel="generated images", yscale=scale)
        for path in args.logs:
            lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
            names = {name for line in lines for name in line if name.startswith(beginning)}
            for name in sorted(names):
                points = [(line["images"], line[name]) for line in lines if name in line]
                [curve] = axes.plot(*zip(*points, strict=True), label=f"{path} {name}")
                for real in {line[f"real_{name}"] for line in lines if f"real_{name}" in line}:
                    axes.axhline(real, color=curve.get_color(), linestyle="--")
                axes.legend()
    figure.axes[0].set_ylim(bottom=1e-4)  # at first everything is far from everything
    figure.savefig(args.out)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(str(error))
