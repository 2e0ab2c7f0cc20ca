"""
Converts the authors' released JAX weights, trained on ImageNet, into files of this repository.

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

REPOSITORY = "Goodeat/drifting"
WEIGHTS, METADATA = "ema_params.msgpack", "metadata.json"

# Modules of model.py, and what the authors call them; those of a block are below blocks_i.
GENERATOR_NAMES = {
    "label_embed": "Embed_0",
    "alpha_norm": "RMSNorm_0",
    "alpha_embed.0": "TimestepEmbedder_0/TorchLinear_0",
    "alpha_embed.2": "TimestepEmbedder_0/TorchLinear_1",
    "patch_embed": "LightningDiT_0/TorchLinear_0",
    "cls_proj": "LightningDiT_0/TorchLinear_1",
    "final_norm": "LightningDiT_0/FinalLayer_0/RMSNorm_0",
    "final_adaln": "LightningDiT_0/FinalLayer_0/TorchLinear_0",
    "final_proj": "LightningDiT_0/FinalLayer_0/TorchLinear_1",
    "norm1": "RMSNorm_0",
    "norm2": "RMSNorm_1",
    "adaln": "TorchLinear_0",
    "attn.qkv": "Attention_0/TorchLinear_0",
    "attn.q_norm": "Attention_0/q_norm",
    "attn.k_norm": "Attention_0/k_norm",
    "attn.proj": "Attention_0/TorchLinear_1",
    "mlp.w13": "SwiGLUFFN_0/TorchLinear_0",  # and TorchLinear_1
    "mlp.w2": "SwiGLUFFN_0/TorchLinear_2",
}

# Patterns of parameters of mae.py, and what the authors call them, replaced one after the other.
MAE_NAMES = [
    (r"^stem\.0", "encoder.conv1"),
    (r"^stem\.1", "encoder.gn1"),
    (r"^stages\.(\d+)\.(\d+)", r"encoder.stages_\1.layers_\2"),
    (r"\.conv(\d)\.0", r".conv\1"),
    (r"\.conv(\d)\.1", r".gn\1"),
    (r"\.skip\.0", ".proj_conv"),
    (r"\.skip\.1", ".proj_gn"),
    (r"^norms\.(\d)", lambda m: f"encoder.layer{int(m[1]) + 1}_norm"),
    (r"^bridge", "decoder.bridge"),
    (r"^ups\.(\d)", lambda m: f"decoder.up{4 - int(m[1])}{3 - int(m[1])}"),
    (r"(up\d\d)\.0", r"\1.concat_norm_fn"),
    (r"(up\d\d)\.1", r"\1.proj"),
    (r"(up\d\d)\.2", r"\1.refine"),
    (r"(bridge|proj|refine)\.0", r"\1.conv"),
    (r"(bridge|proj|refine)\.1", r"\1.gn"),
    (r"^head", "fc"),
    (r"^out", "decoder.head"),
]


def generator_key(name, config):
    """Where the authors keep parameter `name` of a DiT -> keys, order of their axes in ours.

    If there are several keys, their arrays one after the other are our parameter.
    """
    if name == "style_embed.weight":
        return [f"noise_embeds_{i}/embedding" for i in range(config.noise_coords)], (0, 1)
    if name in ("pos_embed", "cls_embed"):
        return [f"LightningDiT_0/{name}"], (0, 1, 2)
    module, leaf = name.rsplit(".", 1)
    where = ""
    if module.startswith("blocks."):
        _, i, module = module.split(".", 2)
        where = f"LightningDiT_0/blocks_{i}/"
    where += GENERATOR_NAMES[module]
    if "Embed_" in where:
        return [f"{where}/embedding"], (0, 1)
    if "TorchLinear" not in where:
        return [f"{where}/{leaf}"], (0,)
    leaf, order = ("kernel", (1, 0)) if leaf == "weight" else ("bias", (0,))  # kernel: [in, out]
    keys = [f"{where}/Dense_0/{leaf}"]
    if module == "mlp.w13":
        keys.append(keys[0].replace("TorchLinear_0", "TorchLinear_1"))
    return keys, order


def mae_key(name):
    """Where the authors keep parameter `name` of an MAE, in the form of generator_key()."""
    for pattern, new in MAE_NAMES:
        name = re.sub(pattern, new, name)
    *where, leaf = name.split(".")
    place = "/".join(where)
    if leaf == "bias":
        return [f"{place}/bias"], (0,)
    if "gn" in where[-1] or "norm" in where[-1]:
        return [f"{place}/scale"], (0,)
    if where == ["fc"]:
        return [f"{place}/kernel"], (1, 0)
    return [f"{place}/kernel"], (3, 2, 0, 1)  # theirs: height, width, in, out


def load_generator(folder):
    """Loads a generator of the authors as a DiT on the CPU. Raises ValueError for other weights."""
    config, arrays = read(folder, "gen")
    net = DiT(DiTConfig(**{field.name: config[field.name] for field in fields(DiTConfig)}))
    fill(net, {name: generator_key(name, net.config) for name in net.state_dict()}, arrays)
    return net


def load_mae(folder):
    """Loads an encoder of the authors as an MAE on the CPU. Raises ValueError for other weights."""
    config, arrays = read(folder, "mae")
    patch = config["input_patch_size"]
    shape = dict(size=32 * patch, patch=patch, group=1)
    shape |= dict(channels=config["in_channels"], width=config["base_channels"])
    net = MAE(layers=config["layers"], num_classes=config["num_classes"], **shape)
    fill(net, {name: mae_key(name) for name in net.state_dict()}, arrays)
    return net


def fill(net, plan, arrays):
    """Copies arrays {official key: tensor} into net; plan: {our name: (keys, order)}."""
    for name, parameter in net.state_dict().items():
        keys, order = plan[name]
        for key, part in zip(keys, parameter.chunk(len(keys)), strict=True):
            if key not in arrays:
                raise ValueError(f"the weights lack {key}")
            array = arrays.pop(key)
            if array.ndim != part.ndim or array.permute(order).shape != part.shape:
                shapes = f"{list(array.shape)}, but ours, {name}, {list(parameter.shape)}"
                raise ValueError(f"{key} has shape {shapes}")
            part.copy_(array.permute(order))
    if arrays:
        raise ValueError(f"the weights have {min(arrays)}, which our network has not")


def find(folder):
    """The folder of the two files, folder itself or its params_ema/, and the metadata."""
    inner = Path(folder) / "params_ema"
    folder = inner if inner.is_dir() else Path(folder)
    return folder, json.loads((folder / METADATA).read_text())


def read(folder, kind):
    """Reads the two files -> model_config, {official key: tensor}."""
    import msgpack

    def to_tensor(code, packed):  # nothing in these files can run code
        shape, dtype, raw = msgpack.unpackb(packed)
        types = dict(float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16)
        return torch.frombuffer(bytearray(raw), dtype=types[dtype]).reshape(shape)

    folder, metadata = find(folder)
    if metadata["kind"] != kind:
        raise ValueError(f"{METADATA} describes a {metadata['kind']}, not a {kind}")
    tree = msgpack.unpackb((folder / WEIGHTS).read_bytes(), ext_hook=to_tensor)
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
        source = Path(snapshot_download(REPOSITORY, allow_patterns=f"{inside}/*")) / inside
    _, metadata = find(source)
    if metadata["kind"] == "mae":
        net = load_mae(source)
        return dict(config=net.config, model=net.state_dict())
    net = load_generator(source)
    weights, classes = net.state_dict(), [str(i) for i in range(net.config.num_classes)]
    state = dict(model=weights, ema=weights, config=asdict(net.config), classes=classes)
    return state | dict(args={}, step=0)


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("source", help="a folder, or hf://NAME of imagenet/README.md")
    p.add_argument("out", help="file to write")
    args = p.parse_args(argv)
    try:
        state = convert(args.source)
        with open(args.out, "wb") as file:
            torch.save(state, file)
    except ImportError as error:
        sys.exit(f"{error}: pip install msgpack huggingface_hub")
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())  # those of huggingface_hub have several lines
        sys.exit(f"{args.source}: {message}")


if __name__ == "__main__":
    main()
