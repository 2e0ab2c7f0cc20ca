"""The folder imagenet/: the authors' files as ours, and data sets as latents."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
import mae
import model
from conftest import ASSETS, needs, refusal, write_folder
from imagenet import convert, encode

ARTIFACT = ASSETS / "artifact_gen"  # written by the official code, random weights


def test_a_generator_becomes_a_checkpoint(tmp_path, monkeypatch):
    """From a folder or the hub; that it gives the authors' images is shown in test_drift.py."""
    needs("msgpack")
    needs("huggingface_hub")
    expected = convert.load_generator(ARTIFACT)
    where = "models/gen/jax/pixel_B_sota"
    shutil.copytree(ARTIFACT / "params_ema", tmp_path / where)
    download = mock.Mock(return_value=tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for source in (ARTIFACT, "hf://pixel_B_sota"):
        convert.main([str(source), str(tmp_path / "a.pt")])
        net, checkpoint = model.load(tmp_path / "a.pt")
        torch.testing.assert_close(net.state_dict(), expected.state_dict(), rtol=0, atol=0)
        assert net.config == expected.config
        assert checkpoint["classes"] == [str(i) for i in range(11)] and not checkpoint["args"]
    download.assert_called_once_with("Goodeat/drifting", allow_patterns=f"{where}/*")
    assert "metadata.json" in refusal(convert.main, "hf://pixel_B", tmp_path / "b.pt")


def test_an_encoder_becomes_a_file_of_mae(tmp_path):
    msgpack = needs("msgpack")
    expected, arrays = mae.MAE(channels=4, width=8, layers=[1, 2, 1, 1], num_classes=11), {}
    for name, parameter in expected.state_dict().items():
        torch.nn.init.normal_(parameter)
        [key], order = convert.mae_key(name)
        array = parameter.permute(np.argsort(order).tolist()).contiguous().numpy()
        packed = msgpack.packb([array.shape, "float32", array.tobytes()])
        arrays[key] = msgpack.ExtType(1, packed)
    config = dict(in_channels=4, base_channels=8, layers=[1, 2, 1, 1], input_patch_size=1)
    metadata = dict(kind="mae", model_config=config | dict(num_classes=11, dropout_prob=0.0))
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    (tmp_path / "ema_params.msgpack").write_bytes(msgpack.packb(arrays))
    convert.main([str(tmp_path), str(tmp_path / "a.pt")])
    net = mae.load(tmp_path / "a.pt")
    torch.testing.assert_close(net.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert net.config == expected.config


def test_weights_that_do_not_fit_are_one_line(tmp_path):
    needs("msgpack")
    folder, out = tmp_path / "a", tmp_path / "a.pt"
    shutil.copytree(ARTIFACT / "params_ema", folder)
    metadata = json.loads((folder / "metadata.json").read_text())

    def changed(**config):
        text = json.dumps(dict(kind="gen", model_config=metadata["model_config"] | config))
        (folder / "metadata.json").write_text(text)
        return refusal(convert.main, folder, out)

    assert "network lack LightningDiT_0/blocks_3/" in changed(depth=4)
    assert "network lack LightningDiT_0/blocks_2/" in changed(depth=2)
    assert "label_embed.weight" in changed(num_classes=10)
    assert not out.exists()


@pytest.fixture
def command(tmp_path):
    """Encodes five cats and five dogs, one of noise, by random weights to 4 x 8 x 8."""
    vae = needs("diffusers").AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    vae.save_pretrained(tmp_path / "vae")
    pets = write_folder(tmp_path / "pets", 5)
    noise = np.random.randint(0, 256, (34, 55, 3), np.uint8)
    Image.fromarray(noise).save(pets / "dogs" / "1.png")
    command = ["--dataset", f"folder:{pets}", "--vae", tmp_path / "vae", "--out", tmp_path / "out"]
    command += ["--size", 16, "--batch", 4, "--device", "cpu"]
    return [str(word) for word in command]


def test_latents_of_a_folder(tmp_path, command):
    encode.main(command)
    latents, labels, names = data.load(f"latents:{tmp_path}/out")
    assert latents.shape == (10, 2, 4, 8, 8) and latents.dtype == torch.float16
    assert labels.tolist() == [0] * 5 + [1] * 5 and names == ["cats", "dogs"]
    vae = needs("diffusers").AutoencoderKL.from_pretrained(tmp_path / "vae")
    views = encode.read(tmp_path / "pets" / "dogs" / "1.png", 16)
    with torch.no_grad():
        spread = vae.encode(data.to_float(torch.from_numpy(views))).latent_dist
    noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(4))[4:6]
    expected = (spread.mean + spread.std * noise - 0.25) * 0.5
    assert (latents[6] - expected).abs().max() < 0.01


def test_a_killed_run_goes_on_to_the_same_file(tmp_path, command):
    encode.main(command)
    path, counter = tmp_path / "out" / "latents.npy", tmp_path / "out" / "done"
    expected, damaged = np.load(path), np.load(path, mmap_mode="r+")
    expected[:4] = damaged[:4] = 7  # these stay, as they count as written
    damaged[4:] = 9
    damaged.flush()
    counter.write_text("4")
    encode.main(command)
    assert np.load(path).tobytes() == expected.tobytes() and counter.read_text() == "10"
    assert "another data set or size" in refusal(encode.main, *command, "--size", 32)


def test_views_are_the_middle_of_a_colour_image_and_its_mirror_image(tmp_path):
    Image.fromarray(data.load("digits")[0][0, 0].numpy()).save(tmp_path / "grey.png")
    [image, mirror] = encode.read(tmp_path / "grey.png", 16)
    assert image.shape == (3, 16, 16) and (image == mirror[:, :, ::-1]).all()
    assert (image[0] == image[1]).all() and image.std() > 50
    # as ADM: halved by boxes while it is twice too large, then resized, then cut
    blocks = np.random.randint(0, 256, (16, 20, 3), np.uint8)
    image = Image.fromarray(blocks.repeat(4, axis=0).repeat(4, axis=1))  # 80 x 64
    assert np.array_equal(encode.centre_crop(image, 16), blocks[:, 2:18])
    assert encode.centre_crop(image.resize((31, 130)), 16).size == (16, 16)
