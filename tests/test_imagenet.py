"""The folder imagenet/: the authors' files as ours, and data sets as latents."""

import functools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import mae
import model
from conftest import ASSETS, needs
from imagenet import convert, encode

ARTIFACT = ASSETS / "artifact_gen" / "params_ema"  # written by the official code, random weights


def write_mae(folder):
    """An encoder of noise as the authors' code writes it, and the same network of ours."""
    needs("msgpack")
    import msgpack

    net = mae.MAE(
        channels=4, size=32, width=8, patch=1, layers=[1, 2, 1, 1], num_classes=11, group=1
    )
    tree = {}
    for name, parameter in net.state_dict().items():
        torch.nn.init.normal_(parameter)
        [key], order = convert.mae_key(name)
        back = [order.index(i) for i in range(len(order))]
        array = parameter.permute(back).contiguous().numpy()
        packed = msgpack.packb([array.shape, "float32", array.tobytes()])
        *path, leaf = key.split("/")
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), path, tree)
        node[leaf] = msgpack.ExtType(1, packed)
    config = dict(in_channels=4, base_channels=8, layers=[1, 2, 1, 1], input_patch_size=1)
    metadata = dict(kind="mae", model_config=config | dict(num_classes=11, dropout_prob=0.0))
    folder.mkdir()
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (folder / "ema_params.msgpack").write_bytes(msgpack.packb(tree))
    return net


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def line(script, *args):
    """Runs a script that has to end with one line for the user, and returns the line."""
    with pytest.raises(SystemExit) as stop:
        script.main([str(a) for a in args])
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def test_a_generator_becomes_a_checkpoint(tmp_path):
    needs("msgpack")
    expected = convert.load_generator(ARTIFACT)
    shutil.copytree(ARTIFACT, tmp_path / "flat")
    for folder in (ARTIFACT, ARTIFACT.parent, tmp_path / "flat"):
        convert.main([str(folder), str(tmp_path / "a.pt")])
        net, checkpoint = model.load(tmp_path / "a.pt")
        assert equal(net, expected) and net.config == expected.config
        assert checkpoint["classes"] == [str(i) for i in range(11)]
        assert checkpoint["args"] == {} and checkpoint["step"] == 0
    images = [
        dit.generate(torch.tensor([2, 9]), 1.5, torch.Generator().manual_seed(0))
        for dit in (net, expected)
    ]
    assert torch.equal(*images) and images[0].std() > 0.1


def test_an_encoder_becomes_a_file_of_mae(tmp_path):
    expected = write_mae(tmp_path / "a")
    convert.main([str(tmp_path / "a"), str(tmp_path / "a.pt")])
    net = mae.load(tmp_path / "a.pt")
    assert equal(net, expected) and net.config == expected.config


def test_weights_that_do_not_fit_are_one_line(tmp_path, monkeypatch):
    needs("msgpack")
    import msgpack

    folder, out = tmp_path / "a", tmp_path / "a.pt"
    shutil.copytree(ARTIFACT, folder)
    metadata = json.loads((folder / "metadata.json").read_text())
    weights = (folder / "ema_params.msgpack").read_bytes()

    def changed(raw=weights, kind="gen", **config):
        text = json.dumps(dict(kind=kind, model_config=metadata["model_config"] | config))
        (folder / "metadata.json").write_text(text)
        (folder / "ema_params.msgpack").write_bytes(raw)
        return line(convert, folder, out)

    assert "lack LightningDiT_0/blocks_3/RMSNorm_0/weight" in changed(depth=4)
    assert "have LightningDiT_0/blocks_2/" in changed(depth=2)
    assert "Embed_0/embedding has shape [11, 64]" in changed(num_classes=10)
    assert "describes a toy, not a gen" in changed(kind="toy")
    other = weights.replace(b"\xa7float32", b"\xa7float64", 1)
    assert "float64 is not a type of weights" in changed(other)
    assert "incomplete" in changed(weights[:-1])
    assert "No such file" in line(convert, tmp_path / "none", out)
    assert not out.exists()

    with pytest.raises(ValueError, match="describes a gen, not a mae"):
        convert.load_mae(ARTIFACT)
    half = msgpack.packb([[2, 1], "bfloat16", b"\x80\x3f\x00\xc0"])
    assert convert.to_tensor(1, half).tolist() == [[1], [-2]]
    monkeypatch.setitem(sys.modules, "msgpack", None)
    assert "pip install msgpack" in line(convert, ARTIFACT, out)


def test_names_on_the_hub(tmp_path, monkeypatch):
    needs("msgpack")
    needs("huggingface_hub")
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, *allow_patterns))
        shutil.copytree(ARTIFACT, tmp_path / "models/gen/jax/pixel_B_sota")
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    convert.main(["hf://pixel_B_sota", str(tmp_path / "a.pt")])
    where = "models/gen/jax/pixel_B_sota"
    files = (f"{where}/metadata.json", f"{where}/ema_params.msgpack")
    assert asked == [("Goodeat/drifting", *files)]
    assert equal(model.load(tmp_path / "a.pt")[0], convert.load_generator(ARTIFACT))
    assert "pixel_L_sota" in line(convert, "hf://pixel_B", tmp_path / "b.pt")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install" in line(convert, "hf://ablation", tmp_path / "b.pt")
    assert not (tmp_path / "b.pt").exists()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """An autoencoder of random weights, 3 x 16 x 16 to 4 x 8 x 8, and its folder."""
    needs("diffusers")
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    net = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    folder = tmp_path_factory.mktemp("vae")
    net.save_pretrained(folder)
    return net.eval(), folder


@pytest.fixture
def pets(tmp_path):
    """10 pictures of noise, of odd sizes, in two classes."""
    rng = np.random.default_rng(0)
    for name, n in (("cats", 4), ("dogs", 6)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(n):
            noise = rng.integers(0, 256, (20 + 7 * i, 61 - 3 * i, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "pets" / name / f"{i}.png")
    return tmp_path / "pets"


def command(dataset, vae, out):
    args = ["--dataset", dataset, "--vae", vae, "--out", out]
    args += ["--size", 16, "--batch", 4, "--device", "cpu", "--seed", 3]
    return [str(a) for a in args]


def test_latents_of_a_folder(tmp_path, vae, pets):
    net, folder = vae
    out = tmp_path / "latents"
    encode.main(command(f"folder:{pets}", folder, out))
    latents = np.load(out / "latents.npy")
    assert latents.shape == (10, 2, 4, 8, 8) and latents.dtype == np.float16
    assert np.load(out / "labels.npy").tolist() == [0] * 4 + [1] * 6
    assert (out / "classes.txt").read_text() == "cats\ndogs\n"
    assert (out / "done").read_text() == "10"

    image = encode.centre_crop(data.read_image(pets / "dogs" / "2.png"), 16)
    views = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    with torch.no_grad():
        spread = net.encode(torch.stack([views, views.flip(-1)])).latent_dist
    noise = np.random.default_rng([3, 6]).standard_normal((2, 4, 8, 8), np.float32)
    expected = (spread.mean + spread.std * torch.from_numpy(noise) - 0.25) * 0.5
    assert (torch.from_numpy(latents[6]) - expected).abs().max() < 0.01
    assert (expected[0] - expected[1].flip(-1)).abs().max() > 0.1

    images, labels, names = data.load(f"latents:{out}")
    assert np.array_equal(images, latents)
    assert labels.tolist() == [0] * 4 + [1] * 6 and names == ["cats", "dogs"]


def test_a_killed_run_goes_on_to_the_same_file(tmp_path, vae, pets):
    plan = command(f"folder:{pets}", vae[1], tmp_path / "latents")
    path, counter = tmp_path / "latents" / "latents.npy", tmp_path / "latents" / "done"
    encode.main(plan)
    whole = path.read_bytes()
    damaged = np.load(path, mmap_mode="r+")
    damaged[:4] = 7  # stays, as it counts as written
    damaged[4:] = 9
    damaged.flush()
    counter.write_text("4")
    path.with_name("labels.npy").unlink()
    encode.main(plan)
    latents = np.load(path)
    assert (latents[:4] == 7).all() and counter.read_text() == "10"
    assert len(np.load(path.with_name("labels.npy"))) == 10
    assert latents[4:].tobytes() == whole[-latents[4:].nbytes :]
    assert "another data set or size" in line(encode, *plan, "--size", 32)
    assert path.stat().st_size == len(whole)


def test_arrays_become_colour_images(tmp_path, vae):
    images, labels, _ = data.load("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda name: (images[:5], labels[:5], list("0123456789")))
        encode.main(command("digits", vae[1], tmp_path / "a"))
    assert np.load(tmp_path / "a" / "latents.npy").shape == (5, 2, 4, 8, 8)
    [image, mirror] = encode.read(images[0].expand(3, -1, -1).numpy(), 16)
    assert image.shape == (3, 16, 16) and (image == mirror[:, :, ::-1]).all()
    assert (image[0] == image[1]).all() and image.std() > 50


def test_the_crop_is_that_of_adm():
    """It is halved by boxes while it is twice too large, then resized, then cut."""
    blocks = np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)
    image = Image.fromarray(blocks.repeat(4, axis=0).repeat(4, axis=1))  # 80 x 64
    assert np.array_equal(encode.centre_crop(image, 16), blocks[:, 2:18])
    for width, height in ((7, 9), (31, 130), (100, 17)):
        assert encode.centre_crop(image.resize((width, height)), 16).size == (16, 16)


def test_what_encode_lacks_is_one_line(tmp_path, vae, pets, monkeypatch):
    out = tmp_path / "a"
    assert "none" in line(encode, *command(f"folder:{tmp_path}/none", vae[1], out))
    (pets / "cats" / "0.png").write_text("no image")
    assert "0.png" in line(encode, *command(f"folder:{pets}", vae[1], out))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in line(encode, *command(f"folder:{pets}", vae[1], out))
