"""
Generators that travel: a folder with all that others need, for a hub of models, and back.

    model.safetensors   the averaged weights, in float32
    config.json         DiTConfig, names of the classes, arguments of the training
    README.md           the model card: data, command, scores
    samples.png         a grid, not chosen

$ python sample.py --ckpt out.pt --export flowers/
$ hf upload USER/NAME flowers
$ python sample.py --ckpt hf://USER/NAME
$ python train.py --dataset folder:leaves --init hf://USER/NAME

Nothing in such a folder is unpickled, so none can run code. Needs pip install safetensors, and
huggingface_hub to read from the hub.
"""

import json
from pathlib import Path

import torch

import data
import log
from model import DiT, DiTConfig, load_checkpoint

WEIGHTS, CONFIG, CARD, GRID = "model.safetensors", "config.json", "README.md", "samples.png"


def safetensors():
    try:
        import safetensors.torch

        return safetensors.torch
    except ImportError:
        raise ValueError(f"{WEIGHTS} needs pip install safetensors") from None


def export(ckpt, folder):
    """Writes the folder for a checkpoint of train.py. Raises ValueError or OSError, one line."""
    package, folder = safetensors(), Path(folder)
    if not str(ckpt).endswith(".pt"):
        raise ValueError(f"--export is for a checkpoint of train.py, which {ckpt} is not")
    model, args = DiT.load(ckpt)
    names, scores = load_checkpoint(ckpt)["classes"], known_scores(ckpt)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    with data.whole(folder / WEIGHTS) as file:  # save_file() has errors of its own
        file.write(package.save(weights))
    config = {"model": vars(model.config), "classes": names, "args": args}
    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    n = len(names)
    label = torch.arange(100) % n if n < 100 else torch.linspace(0, n - 1, 100).long()
    pictures = model.config.in_channels in (1, 3)
    if pictures:
        images = data.to_uint8(model.eval().generate(label, 1.0, torch.Generator().manual_seed(0)))
        data.save_grid(images, folder / GRID, min(n, 10) if n > 1 else 10)
    (folder / CARD).write_text(card(model, args, names, scores, pictures))


def known_scores(ckpt):
    """The last scores of samples in the log beside a checkpoint, {} if there are none."""
    lines = log.read(Path(ckpt).with_suffix(".jsonl"))
    judged = [line for line in lines if "fd" in line]
    return judged[-1] if judged else {}


def card(model, args, names, scores, pictures):
    """The model card, as text."""
    c = model.config
    size = sum(p.numel() for p in model.parameters()) / 1e6
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    lines = ["---", "tags:", "- drifting", "- one-step-generation", "---", ""]
    lines += [f"# A Drifting Model of {args['dataset']}", ""]
    if pictures:
        lines += [f"![samples, not chosen]({GRID})", ""]
    lines += [
        "A generator that needs one forward pass for an image, trained by "
        "[drifting](https://arxiv.org/abs/2602.04770).",
        "",
        f"- {size:.1f}M parameters, {c.in_channels} x {c.input_size} x {c.input_size} numbers",
        f"- {len(names)} classes: {shown}",
        f"- guidance (`--cfg`) from 1 to {args.get('alpha_max', 1):g}",
        f"- drift measured in: {args.get('encoder')}",
    ]
    if scores:
        from fid import score_text  # here: to sample needs no encoder

        text = score_text(scores)
        lines += [f"- after {scores['images']:,} generated images, by pixels: {text}"]
    else:
        lines += ["- scores: not known"]
    command = args.get("command") or "train.py"
    lines += ["", "Trained by", "", f"    python {command}", ""]
    lines += ["To sample, in a clone of the code that wrote this,", ""]
    lines += ["    python sample.py --ckpt hf://USER/NAME --n 64", ""]
    return "\n".join(lines)


def load(source):
    """The generator of hf://USER/NAME or of a folder, on the CPU, and its arguments.

    Raises ValueError or OSError with one line.
    """
    package, name = safetensors(), str(source).removeprefix("hf://")
    folder = fetch(name) if str(source).startswith("hf://") else Path(source)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(f"{source} has no {file}, as sample.py --export writes it")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        state = {k: v.float() for k, v in package.load_file(folder / WEIGHTS).items()}
        shape = DiTConfig(**config["model"])
        if shape.depth > len(state):
            raise ValueError(f"{shape.depth} blocks, and weights of {len(state)} parameters")
        with torch.device("meta"):  # takes no memory: what it asks for may be a mistake
            net = DiT(shape)
        net.load_state_dict(state, assign=True)
        net.add_rope()  # not in the file
        args = config["args"]
        return net, args | {"alpha_max": float(args["alpha_max"])}  # sample.py compares it
    except Exception as error:  # files of unknown origin can hold anything
        what = "is damaged, or no generator of this code"
        raise ValueError(f"{source} {what} ({data.one_line(error)})") from None


def fetch(name):
    """Folder of USER/NAME on the hub; downloads it unless it is there."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"hf://{name} needs pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # network, disk, hub: each raises its own
        raise OSError(f"cannot download hf://{name} ({data.one_line(error)})") from None
