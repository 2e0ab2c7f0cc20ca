"""The authors' released networks: their files, whole, damaged and downloaded; fine-tuning."""

import hashlib
import http.server
import json
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from conftest import (
    ARTIFACT,
    ASSETS,
    QUICK,
    fails,
    needs,
    official_arrays,
    official_config,
    official_generator,
    official_shapes,
    python,
    run,
    train,
    write_artifact,
    write_folder,
)
from mae import MAE
from model import DiT, DiTConfig


def test_artifact_folders_in_both_layouts_give_the_same_images(monkeypatch, tmp_path):
    model, label = official_generator(), torch.tensor([2, 9]).repeat(3)
    expected = []
    for cfg in (1.0, 3.0):
        images = data.to_uint8(model.generate(label, cfg, torch.Generator().manual_seed(0)))
        expected.append(images.permute(0, 2, 3, 1).numpy())
    assert expected[0].std() > 10 and (expected[0] != expected[1]).any()
    shutil.copytree(ARTIFACT, tmp_path / "flat")
    for folder in (ARTIFACT, ARTIFACT.parent, tmp_path / "flat"):
        command = ["sample.py", "--ckpt", folder, "--n", 6, "--classes", 2, 9, "--out"]
        for cfg, images in zip((1, 3), expected, strict=True):
            run(monkeypatch, *command, tmp_path / "a.npz", "--cfg", cfg)
            found = np.load(tmp_path / "a.npz")
            assert found["labels"].tolist() == label.tolist()
            assert (found["arr_0"] == images).all()


CONVERSION = """
import sys, time, model
began = time.time()
net = model.DiT.from_official(sys.argv[1])
[peak] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(time.time() - began, int(peak) * 1024, 4 * sum(p.numel() for p in net.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is in /proc")
def test_conversion_of_a_large_model(tmp_path):
    """Time and peak memory of reading a model of the released B size, in a process of its own."""
    config = DiTConfig.named("B", input_size=256, patch_size=16, num_classes=1000)
    with torch.device("meta"):
        net = DiT(config)
    write_artifact(tmp_path / "B", "gen", official_config(config), official_shapes(net))
    status, out, err = python("-c", CONVERSION, tmp_path / "B")
    shutil.rmtree(tmp_path / "B")
    assert status == 0, err
    seconds, peak, size = map(float, out.split())
    print(f"\nB/16, {size / 2**20:,.0f} MB of weights: {seconds:.1f} s,", end=" ")
    print(f"peak of the process {peak / size:.2f} times that", end="")
    assert seconds < 30 and peak < 2.5 * size


PATH, COMMIT = "models/gen/jax/pixel_B_sota", "c0ffee" * 6 + "c0ff"


class Hub(http.server.BaseHTTPRequestHandler):
    """A server of the artifact in assets/, as pixel_B_sota; its log says what it was asked."""

    def answer(self):
        files = sorted(ARTIFACT.iterdir())
        sha256 = hashlib.sha256((ARTIFACT / "ema_params.msgpack").read_bytes()).hexdigest()
        if self.path.startswith("/api/models/Goodeat/drifting/tree/"):
            listed = []
            for file in files:
                listed.append(dict(type="file", path=f"{PATH}/{file.name}", oid="0" * 40))
                listed[-1]["size"] = file.stat().st_size
            weights = listed[0]
            weights["lfs"] = dict(oid=sha256, size=weights["size"], pointerSize=130)
            return json.dumps(listed).encode(), {}
        if self.path.startswith("/api/models/Goodeat/drifting"):
            siblings = [dict(rfilename=f"{PATH}/{file.name}") for file in files]
            found = dict(id="Goodeat/drifting", sha=COMMIT, siblings=siblings)
            return json.dumps(found).encode(), {}
        if self.path.startswith("/Goodeat/drifting/resolve/") and PATH in self.path:
            body = (ARTIFACT / self.path.split("/")[-1]).read_bytes()
            etag = hashlib.sha256(body).hexdigest()
            return body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        return None, {}

    def do_GET(self):
        self.server.log.append((self.command, self.path))
        body, headers = self.answer()
        self.send_response(404 if body is None else 200)
        for key, value in (headers | {"Content-Length": len(body or b"")}).items():
            self.send_header(key, str(value))
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.log = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()


def test_download_happens_once(tmp_path, hub):
    needs("msgpack")
    needs("huggingface_hub")
    command = ["sample.py", "--ckpt", "hf://pixel_B_sota", "--n", 4, "--out", tmp_path / "a.npz"]
    for _ in range(2):
        status, _, err = python(*command)
        assert status == 0, err
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (4, 16, 16, 3)
    fetched = [path for method, path in hub.log if method == "GET" and "resolve" in path]
    assert sorted(path.split("/")[-1] for path in fetched) == [
        "ema_params.msgpack",
        "metadata.json",
    ]


def test_no_download_is_one_line(monkeypatch, tmp_path, capsys):
    needs("msgpack")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)
        for command in (
            ["sample.py", "--out", tmp_path / "a.png", "--ckpt", "hf://ablation"],
            ["train.py", "--out", tmp_path / "a.pt", "--encoder", "hf://mae_pixel_640"],
        ):
            line = fails(patch, capsys, *command)
            assert f"{command[-1]} needs pip install huggingface_hub, or a folder" in line
    needs("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    status, _, err = python("sample.py", "--ckpt", "hf://ablation", "--out", tmp_path / "a.png")
    assert status == 2 and "cannot download hf://ablation" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_names_that_are_not_released_are_one_line(monkeypatch, capsys):
    needs("msgpack")
    assert "hf://pixel_B_sota" in fails(monkeypatch, capsys, "sample.py", "--ckpt", "hf://pixel_B")
    line = fails(monkeypatch, capsys, "train.py", "--encoder", "hf://pixel_B_sota")
    assert "hf://mae_pixel_640" in line


def latent_artifact(folder):
    """An official generator of latents, and the same network of ours."""
    net = DiT(DiTConfig.named("tiny", input_size=8, in_channels=4, num_classes=5))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)

    def official(part, order):
        return part.permute(order).contiguous().numpy()

    write_artifact(folder, "gen", official_config(net.config), official_arrays(net, official))
    return net


def test_latents_are_kept_or_decoded(monkeypatch, tmp_path, capsys):
    net, label = latent_artifact(tmp_path / "gen"), torch.tensor([0, 1, 2, 3, 4, 0])
    latents = net.generate(label, 1.0, torch.Generator().manual_seed(0))
    command = ["sample.py", "--ckpt", tmp_path / "gen", "--n", 6, "--out"]
    run(monkeypatch, *command, tmp_path / "a.npz")
    kept = np.load(tmp_path / "a.npz")
    torch.testing.assert_close(torch.from_numpy(kept["arr_0"]), latents)
    assert latents.abs().max() > 1 and kept["labels"].tolist() == label.tolist()  # not clamped
    assert "--vae" in fails(monkeypatch, capsys, *command, tmp_path / "a.png")
    line = fails(monkeypatch, capsys, "fid.py", "--ckpt", tmp_path / "gen", "--dataset", "digits")
    assert "gives latents" in line
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", None)
        line = fails(patch, capsys, *command, tmp_path / "a.png", "--vae", "some/vae")
        assert "pip install diffusers" in line

    needs("diffusers")
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    vae.save_pretrained(tmp_path / "vae")
    run(monkeypatch, *command, tmp_path / "b.npz", "--vae", tmp_path / "vae", "--batch", 4)
    with torch.no_grad():
        decoded = vae.eval().decode(latents / 0.18215).sample  # their factor
    expected = data.to_uint8(decoded).permute(0, 2, 3, 1)
    images = torch.from_numpy(np.load(tmp_path / "b.npz")["arr_0"])
    assert images.shape == (6, 16, 16, 3) and expected.float().std() > 5
    assert (images.int() - expected.int()).abs().max() <= 1

    def bad(ckpt, vae):
        more = ["--ckpt", ckpt, "--vae", vae]
        return fails(monkeypatch, capsys, *command, tmp_path / "c.png", *more)

    line = bad(ARTIFACT, tmp_path / "vae")
    assert "decodes 4 channels, the generator gives 3" in line
    assert "cannot decode" in bad(tmp_path / "gen", tmp_path / "none")


def test_fine_tuning_of_an_official_generator(monkeypatch, tmp_path, capsys):
    """On a folder of two classes, in the features of an official encoder; then from its own end."""
    write_folder(tmp_path / "pets")
    encoder = MAE(3, 32, 4, layers=(1, 1, 1, 1), num_classes=11)
    config = dict(num_classes=11, in_channels=3, base_channels=4, layers=[1] * 4)
    config |= dict(input_patch_size=1)
    write_artifact(tmp_path / "mae", "mae", config, official_shapes(encoder))
    config = dict(input_size=32, patch_size=8, hidden_size=32, depth=1, num_heads=2)
    config = DiTConfig(**config, num_classes=11)
    with torch.device("meta"):
        shapes = official_shapes(DiT(config))
    write_artifact(tmp_path / "gen", "gen", official_config(config), shapes)
    start = DiT.from_official(tmp_path / "gen")

    def bad(*args):
        return fails(monkeypatch, capsys, "train.py", "--out", tmp_path / "c.pt", *args)

    assert "gives 3 channels, the images of digits have 1" in bad("--init", tmp_path / "gen")
    assert "is for images of 3 x 32^2, not 1 x 8^2" in bad("--encoder", tmp_path / "mae")
    assert "no checkpoint" in bad("--init", tmp_path / "none.pt")

    plan = [*QUICK, "--dataset", f"folder:{tmp_path}/pets", "--data_dir", tmp_path / "data"]
    plan += ["--n_pos", 4, "--labels", 2, "--encoder", tmp_path / "mae", "--steps", 2]
    plan += ["--lr", 0, "--wd", 0]
    train(*plan, "--init", tmp_path / "gen", "--out", tmp_path / "a.pt", "--stop_after", 1)
    assert "class table: 2 new rows, each the mean of the 11" in capsys.readouterr().out
    model, trained = DiT.load(tmp_path / "a.pt")
    assert model.config.num_classes == 2 and trained["size"] == 32 and trained["patch"] == 8
    mean = start.label_embed.weight.mean(0, keepdim=True)
    torch.testing.assert_close(model.label_embed.weight, mean.expand(2, -1))
    for name, value in start.state_dict().items():
        assert name == "label_embed.weight" or torch.equal(value, model.state_dict()[name])

    shutil.rmtree(tmp_path / "gen")  # it needs that no more
    train("--resume", tmp_path / "a.pt", "--lr", 1e-3)
    moved, _ = DiT.load(tmp_path / "a.pt")
    assert moved.config == model.config
    assert not torch.equal(moved.final_proj.weight, model.final_proj.weight)
    capsys.readouterr()
    train(*plan, "--init", tmp_path / "a.pt", "--out", tmp_path / "b.pt")
    assert "class table" not in capsys.readouterr().out
    assert torch.equal(DiT.load(tmp_path / "b.pt")[0].pos_embed, moved.pos_embed)


def test_damaged_artifacts_are_one_line(monkeypatch, tmp_path, capsys):
    needs("msgpack")
    import msgpack

    metadata = json.loads((ARTIFACT / "metadata.json").read_text())
    whole = (ARTIFACT / "ema_params.msgpack").read_bytes()
    folder, out = tmp_path / "a", tmp_path / "a.png"
    folder.mkdir()

    def bad(metadata=metadata, weights=whole):
        text = metadata if isinstance(metadata, str) else json.dumps(metadata)
        (folder / "metadata.json").write_text(text)
        weights = weights if isinstance(weights, bytes) else msgpack.packb(weights)
        (folder / "ema_params.msgpack").write_bytes(weights)
        return fails(monkeypatch, capsys, "sample.py", "--ckpt", folder, "--out", out)

    def changed(**other):
        return bad(metadata | {"model_config": metadata["model_config"] | other})

    for cut in (whole[:-1], whole[: len(whole) // 2]):
        assert "ema_params.msgpack is truncated" in bad(weights=cut)
    assert "something follows" in bad(weights=whole + b"\0")
    assert "metadata.json is truncated" in bad("{")
    assert "describes a mae, not a gen" in bad(metadata | {"kind": "mae"})
    assert "use_rope" in changed(use_rope=False)
    assert "KeyError" in bad({"kind": "gen"})
    assert "has shape [16], which is not" in changed(num_heads=2)
    assert "lack LightningDiT_0/blocks_3" in changed(depth=4)
    assert "16 arrays too many, such as LightningDiT_0/blocks_2" in changed(depth=2)
    assert "sizes that the weights cannot have" in changed(depth=10**9)
    assert "sizes that the weights cannot have" in changed(hidden_size=10**9)
    other_type = whole.replace(b"\xa7float32", b"\xa7float64", 1)
    assert "float64 is not a type of weights" in bad(weights=other_type)
    assert "Embed_0/embedding is not an array" in bad(weights={"Embed_0": {"embedding": 1.0}})
    assert "max_array_len" in bad(weights={"Embed_0": {"embedding": [1.0, 2.0]}})
    assert "extension 7" in bad(weights={"a": msgpack.ExtType(7, b"")})
    huge = msgpack.packb([[10**9, 10**9], "float32", b"1234"])
    assert "shape" in bad(weights={"a": msgpack.ExtType(1, huge)})
    line = fails(monkeypatch, capsys, "sample.py", "--ckpt", ASSETS, "--out", out)
    assert "has no metadata.json" in line
    monkeypatch.setitem(sys.modules, "msgpack", None)
    line = fails(monkeypatch, capsys, "sample.py", "--ckpt", ARTIFACT, "--out", out)
    assert "pip install msgpack" in line
    assert not out.exists()


def test_flipped_bits_never_end_in_a_traceback(tmp_path):
    """Any change of the files is noticed, or changes nothing but numbers."""
    needs("msgpack")
    shutil.copytree(ARTIFACT, tmp_path / "a")
    rng, works = np.random.default_rng(0), 0
    for file, n in (("metadata.json", 300), ("ema_params.msgpack", 100)):
        whole = (ARTIFACT / file).read_bytes()
        heads = [i for i in range(len(whole)) if whole[i : i + 7] == b"float32"]
        for _ in range(n):
            flipped = bytearray(whole)
            where = rng.integers(len(whole))
            if heads:  # near the heads of arrays: most of the file is numbers
                where = max(0, rng.choice(heads) + rng.integers(-60, 20))
            flipped[where] ^= 1 << rng.integers(8)
            (tmp_path / "a" / file).write_bytes(flipped)
            try:
                works += DiT.from_official(tmp_path / "a").pos_embed.shape == (1, 16, 64)
            except ValueError as error:
                assert "\n" not in str(error)
        (tmp_path / "a" / file).write_bytes(whole)
    assert 0 < works < 400  # some flips hit numbers, or what is not read
