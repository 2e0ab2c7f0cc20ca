"""Converts the authors' released JAX weights, trained on ImageNet, into files of this repository.

$ python -m imagenet.convert hf://pixel_B_sota pixel_B.pt
$ python -m imagenet.convert hf://mae_pixel_640 mae_pixel_640.pt
$ python -m imagenet.convert FOLDER out.pt

FOLDER holds ema_params.msgpack and metadata.json, or has a params_ema/ that does. A generator
becomes a checkpoint as train.py writes it, an encoder a file as mae.py writes it. JAX is not
needed: pip install msgpack huggingface_hub
"""

import argparse
import json
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

from mae import MAE
from model import DiT, DiTConfig

# Patterns of our parameters, and what the authors call them, replaced one after the other.
GENERATOR_NAMES = [
    (r"^label_embed.weight", "Embed_0/embedding"),
    (r"^alpha_norm", "RMSNorm_0"),
    (r"^alpha_embed.0", "TimestepEmbedder_0/TorchLinear_0"),
    (r"^alpha_embed.2", "TimestepEmbedder_0/TorchLinear_1"),
    (r"^patch_embed", "LightningDiT_0/TorchLinear_0"),
    (r"^cls_proj", "LightningDiT_0/TorchLinear_1"),
    (r"^final_norm", "LightningDiT_0/FinalLayer_0/RMSNorm_0"),
    (r"^final_adaln", "LightningDiT_0/FinalLayer_0/TorchLinear_0"),
    (r"^final_proj", "LightningDiT_0/FinalLayer_0/TorchLinear_1"),
    (r"^blocks.(\d+).", r"LightningDiT_0/blocks_\1/"),
    (r"norm1", "RMSNorm_0"),
    (r"norm2", "RMSNorm_1"),
    (r"adaln", "TorchLinear_0"),
    (r"attn.qkv", "Attention_0/TorchLinear_0"),
    (r"attn.(q|k)_norm", r"Attention_0/\1_norm"),
    (r"attn.proj", "Attention_0/TorchLinear_1"),
    (r"mlp.w13", "SwiGLUFFN_0/TorchLinear_0"),  # and TorchLinear_1
    (r"mlp.w2", "SwiGLUFFN_0/TorchLinear_2"),
    (r"(TorchLinear_\d).weight", r"\1/Dense_0/kernel"),
    (r"(TorchLinear_\d).bias", r"\1/Dense_0/bias"),
]
MAE_NAMES = [
    (r"^stem.0", "encoder.conv1"),
    (r"^stem.1", "encoder.gn1"),
    (r"^stages.(\d+).(\d+)", r"encoder.stages_\1.layers_\2"),
    (r"conv(\d).0", r"conv\1"),
    (r"conv(\d).1", r"gn\1"),
    (r"skip.0", "proj_conv"),
    (r"skip.1", "proj_gn"),
    (r"^norms.(\d)", lambda m: f"encoder.layer{int(m[1]) + 1}_norm"),
    (r"^bridge", "decoder.bridge"),
    (r"^ups.(\d)", lambda m: f"decoder.up{4 - int(m[1])}{3 - int(m[1])}"),
    (r"(up\d\d).0", r"\1.concat_norm_fn"),
    (r"(up\d\d).1", r"\1.proj"),
    (r"(up\d\d).2", r"\1.refine"),
    (r"(bridge|proj|refine).0", r"\1.conv"),
    (r"(bridge|proj|refine).1", r"\1.gn"),
    (r"^head", "fc"),
    (r"^out", "decoder.head"),
    (r"(gn\d?|norm|fn).weight", r"\1.scale"),
    (r"weight", "kernel"),
]


def rename(name, patterns):
    for pattern, new in patterns:
        name = re.sub(pattern, new, name)
    return name.replace(".", "/")


def generator_key(name, config):
    """Where the authors keep parameter `name` of a DiT -> keys, order of their axes in ours.
    The arrays of several keys, one after the other, are our parameter."""
    if name == "style_embed.weight":
        return [f"noise_embeds_{i}/embedding" for i in range(config.noise_coords)], (0, 1)
    if name in ("pos_embed", "cls_embed"):
        return [f"LightningDiT_0/{name}"], (0, 1, 2)
    key = rename(name, GENERATOR_NAMES)
    keys = [key, key.replace("TorchLinear_0", "TorchLinear_1")] if "w13" in name else [key]
    orders = {"kernel": (1, 0), "embedding": (0, 1)}  # kernel: in, out
    return keys, orders.get(key.split("/")[-1], (0,))


def mae_key(name):
    """Where the authors keep parameter `name` of an MAE, in the form of generator_key()."""
    key = rename(name, MAE_NAMES)
    if not key.endswith("kernel"):
        return [key], (0,)
    return [key], (1, 0) if key == "fc/kernel" else (3, 2, 0, 1)  # theirs: height, width, in, out


def load_generator(folder):
    """Loads a generator of the authors as a DiT on the CPU."""
    config, arrays = read(folder)
    net = DiT(DiTConfig(**{f.name: config[f.name] for f in fields(DiTConfig) if f.name in config}))
    fill(net, {name: generator_key(name, net.config) for name in net.state_dict()}, arrays)
    return net


def load_mae(folder):
    """Loads an encoder of the authors as an MAE on the CPU."""
    config, arrays = read(folder)
    patch = config["input_patch_size"]
    shape = dict(channels=config["in_channels"], width=config["base_channels"])
    shape |= dict(size=32 * patch, patch=patch, layers=config["layers"])
    net = MAE(num_classes=config["num_classes"], **shape)
    fill(net, {name: mae_key(name) for name in net.state_dict()}, arrays)
    return net


def fill(net, plan, arrays):
    """Copies arrays {official key: tensor} into net; plan: {our name: (keys, order)}."""
    expected = {key for keys, _ in plan.values() for key in keys}
    if arrays.keys() != expected:
        key = min(arrays.keys() ^ expected)
        raise ValueError(f"either the weights or our network lack {key}")
    state = {}
    for name, (keys, order) in plan.items():
        state[name] = torch.cat([arrays[key].permute(order) for key in keys])
    net.load_state_dict(state)


def find(folder):
    """The folder of the two files, folder itself or its params_ema/, and the metadata."""
    inner = Path(folder) / "params_ema"
    folder = inner if inner.is_dir() else Path(folder)
    return folder, json.loads((folder / "metadata.json").read_text())


def read(folder):
    """Reads the two files -> model_config, {official key: tensor}."""
    import msgpack

    def to_tensor(code, packed):  # nothing in these files can run code
        shape, dtype, raw = msgpack.unpackb(packed)
        types = dict(float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16)
        return torch.frombuffer(bytearray(raw), dtype=types[dtype]).reshape(shape)

    folder, metadata = find(folder)
    tree = msgpack.unpackb((folder / "ema_params.msgpack").read_bytes(), ext_hook=to_tensor)
    return metadata["model_config"], dict(flatten(tree))


def flatten(tree, prefix=""):
    """Yields the leaves of a nested dictionary, each with its keys joined by slashes."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def convert(source):
    """hf://NAME or a folder -> the dictionary that train.py or mae.py would save."""
    if source.startswith("hf://"):
        from huggingface_hub import snapshot_download

        inside = f"models/{'mae' if source.startswith('hf://mae') else 'gen'}/jax/{source[5:]}"
        source = Path(snapshot_download("Goodeat/drifting", allow_patterns=f"{inside}/*")) / inside
    _, metadata = find(source)
    if metadata["kind"] == "mae":
        net = load_mae(source)
        return dict(config=net.config, model=net.state_dict())
    net = load_generator(source)
    classes = [str(i) for i in range(net.config.num_classes)]
    state = dict(config=asdict(net.config), classes=classes, args={}, step=0)
    return state | dict(model=net.state_dict(), ema=net.state_dict())


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("source", help="a folder, or hf://NAME of imagenet/README.md")
    p.add_argument("out", help="file to write")
    args = p.parse_args(argv)
    try:
        torch.save(convert(args.source), args.out)
    except (ImportError, ValueError, OSError, RuntimeError) as error:  # of torch: the last
        sys.exit(f"{args.source}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
