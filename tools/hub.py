"""Shares generators: config.json and EMA weights as safetensors, in a folder or on Hugging Face.

$ pip install huggingface_hub safetensors
$ python -m tools.hub save out.pt FOLDER
$ python -m tools.hub push out.pt USER/NAME
$ python -m tools.hub load USER/NAME new.pt  # or a folder; for sample.py, and train.py --init
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import model

try:
    import safetensors  # noqa: F401 - huggingface_hub writes with it
    from huggingface_hub import PyTorchModelHubMixin, snapshot_download
except ImportError:
    sys.exit("tools.hub needs pip install huggingface_hub safetensors")


class HubDiT(model.DiT, PyTorchModelHubMixin, paper_url="https://arxiv.org/abs/2602.04770"):
    """A generator that knows its classes; config.json holds the arguments."""

    def __init__(self, classes, **shape):
        super().__init__(model.DiTConfig(**shape))
        self.classes = classes


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("what", choices=["save", "push", "load"])
    p.add_argument("source")
    p.add_argument("target")
    args = p.parse_args(argv)
    if args.what == "load":
        folder = args.source if Path(args.source).is_dir() else snapshot_download(args.source)
        net = HubDiT.from_pretrained(folder, strict=True)  # from a folder: never a pickle
        checkpoint = dict(config=asdict(net.config), classes=net.classes, args={}, step=0)
        torch.save(checkpoint | dict(model=net.state_dict(), ema=net.state_dict()), args.target)
    else:
        ema, checkpoint = model.load(args.source)
        net = HubDiT(classes=checkpoint["classes"], **asdict(ema.config))
        net.load_state_dict(ema.state_dict())
        send = net.save_pretrained if args.what == "save" else net.push_to_hub
        send(args.target)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(" ".join(str(error).split()))
