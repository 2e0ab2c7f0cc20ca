"""
The authors' released networks (JAX, trained on ImageNet): fetched, read, checked and moved into those of this project.

    hf://pixel_B_sota     one of RELEASED, downloaded once
    FOLDER                ema_params.msgpack and metadata.json, in it or in its params_ema/: what their training writes

JAX is not needed, and nothing in these files can run code: weights are msgpack, the configuration is JSON. Used through
DiT.from_official and MAE.from_official, which know the architectures; this file knows the files.
"""
import json
import os
import sys
import urllib.request
from pathlib import Path

import torch

REPO = "Goodeat/drifting"
RELEASED = {
    "gen": ["latent_L_sota", "latent_B_sota", "pixel_L_sota", "pixel_B_sota", "ablation"],
    "mae": ["mae_latent_640", "mae_pixel_640", "mae_latent_256"],
}
FILES = ["metadata.json", "ema_params.msgpack"]


def load(source, kind, build):
    """The network at source, hf://NAME or a folder, with the authors' weights, on the CPU.

    kind: gen or mae; build(model_config) -> network, which says by net.official_name(parameter) how the file calls a
    parameter. Every array is compared with the network before that takes any memory, and then moved one by one: the
    peak is little above the size of the weights. Raises ValueError or OSError with one line.
    """
    config, arrays = _read(str(source), kind)
    try:
        counts = [config.get("depth", 0), config.get("noise_coords", 0), *config.get("layers", [])]
        if sum(counts) > len(arrays) or not all(v < 2**15 for v in config.values() if isinstance(v, int)):
            raise ValueError("sizes that the weights cannot have")
        with torch.device("meta"):                                                               # shapes, no memory
            net = build(config)
    except Exception as error:  # a file of unknown origin can hold anything
        raise ValueError(f"{source}: metadata.json is not of a model that this code knows ({_line(error)})") from None
    plan = {}
    for name, parameter in net.state_dict().items():
        keys, order = plan[name] = net.official_name(name)
        for key in keys:
            if key not in arrays:
                raise ValueError(f"{source}: the weights lack {key}")
        shapes = [[arrays[key].shape[i] for i in order] for key in keys if arrays[key].ndim == len(order)]
        expected = [parameter.shape[0] // len(keys), *parameter.shape[1:]]
        if shapes != [expected] * len(keys):
            raise ValueError(f"{source}: {keys[0]} has shape {list(arrays[keys[0]].shape)}, which is not that of "
                             f"{name}, {list(parameter.shape)}, in the network that metadata.json describes")
    extra = set(arrays) - {key for keys, _ in plan.values() for key in keys}
    if extra:
        raise ValueError(f"{source}: the weights have {len(extra)} arrays too many, such as {min(extra)}")
    state = {}
    for name, (keys, order) in plan.items():
        parts = [arrays.pop(key).permute(order).float() for key in keys]          # popped: its memory goes with `parts`
        state[name] = torch.cat(parts) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)
    net.load_state_dict(state, assign=True)
    return net


def _line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _read(source, kind):
    """-> model_config of metadata.json, {official name: tensor} of ema_params.msgpack."""
    try:
        import msgpack
    except ImportError:
        raise ValueError(f"{source} is a msgpack file: pip install msgpack") from None
    folder = _fetch(source.removeprefix("hf://"), kind) if source.startswith("hf://") else Path(source)
    if (folder / "params_ema").is_dir():
        folder = folder / "params_ema"
    for file in FILES:
        if not (folder / file).is_file():
            raise ValueError(f"{source} has no {file}: a folder of the authors holds {' and '.join(FILES)}")

    def array(code, data):
        if code != 1:
            raise ValueError(f"extension {code} is not an array")
        shape, dtype, raw = msgpack.unpackb(data)
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"{dtype} is not a type of weights")
        return torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)).reshape(shape)

    def flatten(tree, prefix):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{key}/")
            elif isinstance(value, torch.Tensor):
                yield prefix + key, value
            else:
                raise ValueError(f"{prefix}{key} is not an array")

    file = folder / FILES[0]
    try:
        metadata = json.loads(file.read_bytes())
        found, config = metadata["kind"], dict(metadata["model_config"])
        if found != kind:
            raise ValueError(f"it describes a {found}, not a {kind}")
        file = folder / FILES[1]
        size = file.stat().st_size
        with open(file, "rb") as stream:  # read in pieces: the file is never in memory as a whole
            unpacker = msgpack.Unpacker(stream, ext_hook=array, max_buffer_size=size, max_map_len=2**15,
                                        max_array_len=0)
            arrays = dict(flatten(unpacker.unpack(), ""))
            if unpacker.tell() != size:
                raise ValueError("something follows the weights")
    except Exception as error:  # a file of unknown origin can hold anything
        raise ValueError(f"{file} is truncated, damaged or not of the authors' code ({_line(error)})") from None
    return config, arrays


def _fetch(name, kind):
    """Folder of a released artifact; downloads it unless it is there."""
    if name not in RELEASED[kind]:
        raise ValueError(f"the authors have released no {kind} named {name!r}, but " +
                         ", ".join(f"hf://{n}" for n in RELEASED[kind]))
    path = f"models/{kind}/jax/{name}"
    try:
        try:
            from huggingface_hub import snapshot_download
            return Path(snapshot_download(REPO, allow_patterns=[f"{path}/{file}" for file in FILES])) / path
        except ImportError:
            return _download(path, Path(torch.hub.get_dir()) / "drifting" / name)
    except Exception as error:  # network, disk, hub: each raises its own
        raise OSError(f"cannot download hf://{name} ({_line(error)}): without a network, name a folder with "
                      f"{' and '.join(FILES)} instead") from None


def _download(path, folder):
    """The same without huggingface_hub: sizes and SHA-256 sums as the hub lists them."""
    if not all((folder / file).exists() for file in FILES):
        folder.mkdir(parents=True, exist_ok=True)
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        with urllib.request.urlopen(f"{hub}/api/models/{REPO}/tree/main/{path}", timeout=60) as response:
            listed = {Path(entry["path"]).name: entry for entry in json.load(response)}
        for file in FILES:
            part = folder / f"{file}.{os.getpid()}.part"
            try:
                torch.hub.download_url_to_file(f"{hub}/{REPO}/resolve/main/{path}/{file}", part,
                                               listed[file].get("lfs", {}).get("oid"), sys.stderr.isatty())
                if part.stat().st_size != listed[file]["size"]:
                    raise ValueError(f"{file} has {part.stat().st_size} bytes instead of {listed[file]['size']}")
                os.replace(part, folder / file)                              # the final name never holds half a file
            finally:
                part.unlink(missing_ok=True)
    return folder
