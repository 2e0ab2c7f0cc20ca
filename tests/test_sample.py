"""Images from a checkpoint, as a grid, files or an array."""

import numpy as np
import torch
from PIL import Image

import data
import sample
from conftest import needs, refusal, save_generator, tiny_generator
from model import SIZES, DiT, DiTConfig


def draw(ckpt, out, *options):
    sample.main(["--ckpt", str(ckpt), "--out", str(out), *map(str, options)])
    if out.suffix == ".npz":  # images and labels
        return np.load(out)["arr_0"], np.load(out)["labels"].tolist()


def refuses(word, ckpt, out, *options):
    assert word in refusal(sample.main, "--ckpt", ckpt, "--out", out, *options)


def test_grid_files_and_array_are_the_same_images(tmp_path):
    ckpt = save_generator(tiny_generator(), tmp_path / "a.pt", [*"0123456789"])
    images, labels = draw(ckpt, tmp_path / "a.npz", "--n", 25)
    assert images.shape == (25, 8, 8, 1) and labels == [i % 10 for i in range(25)]
    in_parts, _ = draw(ckpt, tmp_path / "b.npz", "--n", 25, "--batch", 7)
    assert np.abs(images - in_parts.astype(int)).max() <= 1  # batches round in another order
    assert (images != draw(ckpt, tmp_path / "c.npz", "--n", 25, "--seed", 1)[0]).mean() > 0.5
    draw(ckpt, tmp_path / "files", "--n", 25)
    files = [tmp_path / "files" / f"{i:06d}_{i % 10}.png" for i in range(25)]
    assert (np.stack([Image.open(file) for file in files]) == images[..., 0]).all()
    draw(ckpt, tmp_path / "grid.png", "--n", 25)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))[::7, ::7]  # small images are enlarged
    assert grid.shape == (30, 100) and (grid[11:19, 21:29] == images[12, ..., 0]).all()


def test_classes_by_name_and_number(tmp_path):
    ckpt, out = tmp_path / "a.pt", tmp_path / "a.npz"
    save_generator(tiny_generator(), ckpt, ["1", "2"])
    assert draw(ckpt, out, "--n", 3)[1] == [1, 2, 1]  # as in the data
    save_generator(tiny_generator(), ckpt, ["10", "2", "rose"])
    wanted = ["rose", "10", "2", "0", "1"]  # 10 and 2 are names before they are numbers
    assert draw(ckpt, out, "--n", 6, "--classes", *wanted)[1] == [2, 0, 1, 0, 1, 2]
    draw(ckpt, tmp_path / "files", "--n", 1, "--classes", "10")
    assert (tmp_path / "files" / "000000_10.png").exists()
    refuses("not empty", ckpt, tmp_path / "files")
    refuses("no class 3: there are 10, 2, rose", ckpt, out, "--classes", "rose", "3")
    (tmp_path / "cut.pt").write_bytes(ckpt.read_bytes()[:999])
    torch.save({"a": 1}, tmp_path / "odd.pt")
    refuses(f"there is no checkpoint {tmp_path}/none.pt", tmp_path / "none.pt", out)
    for name in ("odd.pt", "cut.pt"):
        refuses(f"{name} is damaged or of another kind", tmp_path / name, out)


def test_names_of_files_and_numbers_of_images(tmp_path, capsys):
    ckpt = save_generator(tiny_generator(), tmp_path / "a.pt", [*"0123456789"])
    draw(ckpt, tmp_path / "one.PNG", "--n", 1)
    assert Image.open(tmp_path / "one.PNG").size == (70, 70)
    sample.main(["--ckpt", str(ckpt), "--out", f"{tmp_path}/v1.5/", "--n", "7", "--batch", "3"])
    assert len([*(tmp_path / "v1.5").iterdir()]) == 7
    state = torch.load(ckpt, weights_only=True) | dict(args=dict(alpha_max=1.0))
    torch.save(state, ckpt)
    draw(ckpt, tmp_path / "c.png", "--cfg", 4)
    assert "without guidance" in capsys.readouterr().out


def test_latents_are_kept_or_decoded(tmp_path):
    needs("diffusers")
    from diffusers import AutoencoderKL

    net = DiT(DiTConfig(**SIZES["tiny"], input_size=8, in_channels=4, patch_size=4))
    torch.nn.init.normal_(net.final_proj.weight, std=0.1)
    ckpt, vae = save_generator(net, tmp_path / "a.pt", ["all"]), AutoencoderKL()
    refuses("--vae", ckpt, tmp_path / "a.png")
    latents, _ = draw(ckpt, tmp_path / "a.npz", "--n", 9)
    vae.save_pretrained(tmp_path / "vae")
    images, _ = draw(ckpt, tmp_path / "b.npz", "--n", 9, "--vae", tmp_path / "vae")
    decoded = data.to_uint8(vae.decode(torch.from_numpy(latents) / 0.18215).sample).int()
    assert np.abs(images - decoded.permute(0, 2, 3, 1).numpy()).max() <= 1
