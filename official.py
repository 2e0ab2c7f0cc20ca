"""
The authors' released networks (JAX, trained on ImageNet): fetched, read, checked, moved into ours.

    hf://pixel_B_sota   one of RELEASED, downloaded once by huggingface_hub
    FOLDER              ema_params.msgpack and metadata.json, as their training writes them, in it
                        or in its params_ema/

JAX is not needed, and nothing in these files can run code: weights are msgpack, the configuration
is JSON. Used through DiT.from_official and MAE.from_official.
"""

import json
import re
from contextlib import contextmanager
from pathlib import Path

import torch

from data import one_line

REPO = "Goodeat/drifting"
RELEASED = {
    "gen": ["latent_L_sota", "latent_B_sota", "pixel_L_sota", "pixel_B_sota", "ablation"],
    "mae": ["mae_latent_640", "mae_pixel_640", "mae_latent_256"],
}
WEIGHTS, METADATA = "ema_params.msgpack", "metadata.json"

# What their generators have and ours has no other of.
FIXED = dict(mlp_ratio=4.0, use_qknorm=True, use_swiglu=True, use_rope=True, use_rmsnorm=True)

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
    (r"^bridge\.0", "decoder.bridge.conv"),
    (r"^bridge\.1", "decoder.bridge.gn"),
    (r"^ups\.(\d)", lambda m: f"decoder.up{4 - int(m[1])}{3 - int(m[1])}"),
    (r"(up\d\d)\.0", r"\1.concat_norm_fn"),
    (r"(up\d\d)\.1", r"\1.proj"),
    (r"(up\d\d)\.2", r"\1.refine"),
    (r"(proj|refine)\.0", r"\1.conv"),
    (r"(proj|refine)\.1", r"\1.gn"),
    (r"^head", "fc"),
    (r"^out", "decoder.head"),
]


def generator_key(name, config):
    """Where the authors keep parameter `name` of a DiT: keys, whose arrays are one table if there
    are several, and the order of the axes."""
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
    if "TorchLinear" in where:
        leaf, order = ("kernel", (1, 0)) if leaf == "weight" else ("bias", (0,))  # [in, out]
        keys = [f"{where}/Dense_0/{leaf}"]
        if module == "mlp.w13":
            keys.append(keys[0].replace("TorchLinear_0", "TorchLinear_1"))
        return keys, order
    if "Embed" in where:
        return [f"{where}/embedding"], (0, 1)
    return [f"{where}/{leaf}"], (0,)


def mae_key(name, config=None):
    """The same of a parameter of an MAE."""
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
    return [f"{place}/kernel"], (3, 2, 0, 1)  # HWIO


def load_generator(source):
    """The authors' generator as a DiT on the CPU. Raises ValueError or OSError with one line."""
    from model import DiT, DiTConfig

    config, arrays = read(source, "gen")
    fixed = FIXED | {"out_channels": config.get("in_channels")}
    other = [name for name, value in fixed.items() if config.get(name, value) != value]
    if other:
        raise ValueError(f"{source}: metadata.json has another {', '.join(other)} than this code")
    with without_memory(source, config, arrays):
        net = DiT(DiTConfig(**{name: config[name] for name in DiTConfig.__dataclass_fields__}))
    move(source, arrays, net, generator_key)
    net.add_rope()  # not in the file
    return net


def load_mae(source):
    """The authors' encoder as an MAE on the CPU. Raises ValueError or OSError with one line."""
    from mae import MAE

    config, arrays = read(source, "mae")
    with without_memory(source, config, arrays):
        net = MAE(
            channels=config["in_channels"],
            size=32 * config["input_patch_size"],
            width=config["base_channels"],
            patch=config["input_patch_size"],
            layers=config["layers"],
            num_classes=config["num_classes"],
        )
    move(source, arrays, net, mae_key)
    return net


@contextmanager
def without_memory(source, config, arrays):
    """Networks that are made here have shapes and no memory, and what a file of unknown origin
    asks for is no more than its weights can be."""
    try:
        counts = [config.get("depth", 0), config.get("noise_coords", 0), *config.get("layers", [])]
        sizes = [size for size in config.values() if isinstance(size, int)]
        if sum(counts) > len(arrays) or max(sizes) >= 2**15:
            raise ValueError("sizes that the weights cannot have")
        with torch.device("meta"):
            yield
    except Exception as error:  # it can hold anything
        what = "metadata.json is not of a model that this code knows"
        raise ValueError(f"{source}: {what} ({one_line(error)})") from None


def move(source, arrays, net, key_of):
    """Moves {official key: tensor} into net, after comparing every name and shape.

    One by one: the peak of the memory is little above the size of the weights.
    """
    plan = {}
    for name, parameter in net.state_dict().items():
        keys, order = plan[name] = key_of(name, getattr(net, "config", None))
        expected = [parameter.shape[0] // len(keys), *parameter.shape[1:]]
        for key in keys:
            if key not in arrays:
                raise ValueError(f"{source}: the weights lack {key}")
            found = list(arrays[key].shape)
            if len(found) != len(order) or [found[i] for i in order] != expected:
                ours = f"{name}, {list(parameter.shape)}, of metadata.json"
                raise ValueError(f"{source}: {key} has shape {found}, which is not that of {ours}")
    extra = set(arrays) - {key for keys, _ in plan.values() for key in keys}
    if extra:
        raise ValueError(f"{source}: {len(extra)} arrays too many, such as {min(extra)}")
    state = {}
    for name, (keys, order) in plan.items():
        parts = [arrays.pop(key).permute(order).float() for key in keys]  # popped: to free it
        state[name] = torch.cat(parts).contiguous()
    net.load_state_dict(state, assign=True)


def read(source, kind):
    """-> model_config of metadata.json, {official key: tensor} of ema_params.msgpack."""
    source = str(source)
    try:
        import msgpack
    except ImportError:
        raise ValueError(f"{source} is a msgpack file: pip install msgpack") from None
    folder = fetch(source.removeprefix("hf://"), kind) if source[:5] == "hf://" else Path(source)
    if (folder / "params_ema").is_dir():
        folder = folder / "params_ema"
    for file in (METADATA, WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(f"{source} has no {file}: theirs hold {METADATA} and {WEIGHTS}")
    file = folder / METADATA
    try:
        metadata = json.loads(file.read_bytes())
        config = dict(metadata["model_config"])
        if metadata["kind"] != kind:
            raise ValueError(f"it describes a {metadata['kind']}, not a {kind}")
        file = folder / WEIGHTS
        size = file.stat().st_size
        limits = dict(max_buffer_size=size, max_map_len=2**15, max_array_len=0)
        with open(file, "rb") as stream:  # read in pieces: never in memory as a whole
            unpacker = msgpack.Unpacker(stream, ext_hook=to_tensor, **limits)
            arrays = dict(flatten(unpacker.unpack(), ""))
            if unpacker.tell() != size:
                raise ValueError("something follows the weights")
    except Exception as error:  # a file of unknown origin can hold anything
        what = "is truncated, damaged or not of the authors' code"
        raise ValueError(f"{file} {what} ({one_line(error)})") from None
    return config, arrays


def to_tensor(code, data):
    """The tensor of a msgpack extension: shape, name of the type, bytes."""
    import msgpack

    if code != 1:
        raise ValueError(f"extension {code} is not an array")
    shape, dtype, raw = msgpack.unpackb(data)
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"{dtype} is not a type of weights")
    return torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)).reshape(shape)


def flatten(tree, prefix):
    """Leaves of a nested dictionary, with the keys that lead there joined by slashes."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        elif isinstance(value, torch.Tensor):
            yield prefix + key, value
        else:
            raise ValueError(f"{prefix}{key} is not an array")


def fetch(name, kind):
    """Folder of a released network; downloads it unless it is there."""
    if name not in RELEASED[kind]:
        known = ", ".join(f"hf://{n}" for n in RELEASED[kind])
        raise ValueError(f"the authors have released no {kind} named {name!r}, but {known}")
    path = f"models/{kind}/jax/{name}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"hf://{name} needs pip install huggingface_hub, or a folder") from None
    try:
        files = [f"{path}/{METADATA}", f"{path}/{WEIGHTS}"]
        return Path(snapshot_download(REPO, allow_patterns=files)) / path
    except Exception as error:  # network, disk, hub: each raises its own
        how = f"without a network, name a folder with {METADATA} and {WEIGHTS}"
        raise OSError(f"cannot download hf://{name} ({one_line(error)}): {how}") from None
