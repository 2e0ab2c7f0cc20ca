"""Computes the numbers that the tests compare with, assets/golden_*.npz, by the authors' JAX code.

$ git clone https://github.com/lambertae/drifting && git -C drifting checkout accd0cf
$ pip install -r requirements-dev.txt jax==0.4.37 jaxlib==0.4.36 flax==0.10.4 absl-py pyyaml
$ python -m imagenet.golden drifting

Each line has the largest relative error of the stored numbers, and of this project's own. Inputs
and weights are random, and stored beside the numbers."""

import json
import sys
from functools import partial

import numpy as np
import torch

import drift
import features
from conftest import ASSETS, golden, our_convnext, our_mae
from imagenet import convert


def report(what, official, *others):
    """A line: the largest errors of {name: array}, relative to the official arrays."""
    errors = []
    for arrays in others:
        off = []
        for name, array in official.items():
            array, other = torch.tensor(np.array(array)), torch.as_tensor(arrays[name]).detach()
            off.append(((other - array).norm() / array.norm()).item())
        errors.append(max(off))
    print(f"{what:26s} {len(official):2d} arrays, stored {errors[0]:.1e}, ours {errors[1]:.1e}")


def check_drift(drift_loss, grad):
    for case in golden("drift")["names"]:
        G = golden("drift", f"{case}/")
        taus = tuple(G["R_list"].tolist())
        args = [G.get(name) for name in ("gen", "fixed_pos", "fixed_neg", "weight_neg")]
        theirs = partial(drift_loss, fixed_pos=args[1], fixed_neg=args[2], weight_neg=args[3])
        loss, info = theirs(args[0], R_list=taus)
        gradient = grad(lambda x, f=theirs, taus=taus: f(x, R_list=taus)[0].mean())(args[0])
        x, *rest = (None if a is None else torch.from_numpy(a) for a in args)
        ours, stats = drift.drift_loss(x.requires_grad_(), *rest, taus=taus, floor=1e-6)
        ours.backward()
        official = dict(loss=loss.mean(), grad=gradient, scale=info["scale"])
        stored = G | dict(loss=G["loss"].mean())
        report(f"drift {case}", official, stored, stats | dict(loss=ours, grad=x.grad))


def main():
    sys.path.insert(0, sys.argv[1])
    import jax
    from drift_loss import drift_loss
    from flax.serialization import msgpack_restore
    from flax.traverse_util import unflatten_dict
    from models.convnext import ConvNextV2
    from models.generator import DitGen
    from models.mae_model import MAEResNetJAX
    from utils.hsdp_util import set_global_mesh

    check_drift(drift_loss, jax.grad)
    set_global_mesh()

    G, folder = golden("generator", "a/"), ASSETS / "artifact_gen" / "params_ema"
    net = DitGen(**json.loads((folder / "metadata.json").read_text())["model_config"])
    params = {"params": msgpack_restore((folder / "ema_params.msgpack").read_bytes())}
    inputs = [G["c"], G["cfg_scale"], G["noise_labels"]]
    cond = net.apply(params, *inputs, method="c_cfg_noise_to_cond")
    official = dict(cond=cond, samples=net.apply(params, G["x"], cond, method="generate_image"))
    net, (label, alpha, style) = convert.load_generator(folder), map(torch.from_numpy, inputs)
    args = style.long(), label.long(), alpha
    x = net(torch.from_numpy(G["x"]).permute(0, 3, 1, 2), *args).permute(0, 2, 3, 1)
    report("generator", official, G, dict(cond=net.condition(*args), samples=x))

    config = json.loads(str(golden("mae")["A/config"]))
    mae = MAEResNetJAX(**config | dict(layers=tuple(config["layers"])))
    convnext = ConvNextV2(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64))
    encoders = ("mae", "A/", mae, our_mae()), ("convnext", "", convnext, our_convnext())
    for name, prefix, net, ours in encoders:
        params = {"params": unflatten_dict(golden(name, f"{prefix}params/"), sep="/")}
        x = golden(name)[f"{prefix}x"]
        official = net.apply(params, x, method="get_activations")
        found = features.multiscale(ours.features(torch.from_numpy(x).permute(0, 3, 1, 2)))
        report(name, official, golden(name, f"{prefix}act/"), found)


if __name__ == "__main__":
    main()
