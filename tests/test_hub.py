"""Generators that travel: exported, read back bit for bit, damaged, and missing on the hub."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import QUICK, fails, needs, python, read, run, train
from model import DiT, DiTConfig

FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def exported(monkeypatch, tmp_path, checkpoint):
    """The folder of a generator of digits, as sample.py --export writes it."""
    needs("safetensors")
    run(monkeypatch, "sample.py", "--ckpt", checkpoint, "--export", tmp_path / "digits")
    return tmp_path / "digits"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for huggingface_hub: hf://me/NAME is a copy of the folder NAME."""

    def snapshot_download(name, allow_patterns):
        user, name = name.split("/")
        if user != "me":
            raise RuntimeError("404:\nnobody of that name")
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        (tmp_path / "cache").mkdir()
        for pattern in allow_patterns:
            for file in (tmp_path / name).glob(pattern):
                shutil.copy(file, tmp_path / "cache")
        return str(tmp_path / "cache")

    module = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def same(a, b):
    assert a.config == b.config and a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]) and value.dtype == torch.float32, name


def test_weights_come_back_bit_for_bit(monkeypatch, tmp_path, checkpoint, exported, hub):
    (a, args), draws = DiT.load(checkpoint), {}

    def draw(source):
        run(monkeypatch, "sample.py", "--ckpt", source, "--n", 20, "--out", tmp_path / "a.npz")
        return np.load(tmp_path / "a.npz")["arr_0"]

    expected = draw(checkpoint)
    train(*QUICK, "--init", "hf://me/digits", "--steps", 1, "--lr", 0, "--out", tmp_path / "b.pt")
    same(a, DiT.load(tmp_path / "b.pt")[0])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", None)  # nothing is unpickled
        for source in (exported, f"{exported}/", "hf://me/digits"):
            b, again = DiT.load(source)
            same(a, b)
            assert args == again
            draws[source] = draw(source)
    assert expected.std() > 10 and all((expected == found).all() for found in draws.values())
    files = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert files == ["config.json", "model.safetensors"]  # no more is fetched


def test_card(exported, checkpoint):
    assert sorted(path.name for path in exported.iterdir()) == [*FILES, "samples.png"]
    assert Image.open(exported / "samples.png").size == (700, 700)  # ten of each class
    card, args = (exported / "README.md").read_text(), read(checkpoint)["args"]
    lines = checkpoint.with_suffix(".jsonl").read_text().splitlines()
    fd = json.loads(lines[-1])["fd"]
    for text in (
        "# A Drifting Model of digits",
        "![samples, not chosen](samples.png)",
        "0.8M parameters, 1 x 8 x 8 numbers",
        "10 classes: 0, 1, 2,",
        f"after 4,800 generated images, by pixels: fd {fd:.3f}  nearest-neighbour",
        f"    python {args['command']}\n",
    ):
        assert text in card
    assert card.startswith("---\ntags:\n") and card.count("\n---\n") == 1


def test_card_of_what_is_no_picture_and_has_no_log(monkeypatch, tmp_path, checkpoint):
    """A generator of five channels, in half precision."""
    needs("safetensors")
    net = DiT(DiTConfig(8, 5, 4, hidden_size=8, depth=1, num_heads=1, num_classes=1))
    half = {name: value.half() for name, value in net.state_dict().items()}
    saved = read(checkpoint) | dict(config=vars(net.config), ema=half, classes=["all"])
    torch.save(saved, tmp_path / "a.pt")
    run(monkeypatch, "sample.py", "--ckpt", tmp_path / "a.pt", "--export", tmp_path / "five")
    same(DiT.load(tmp_path / "a.pt")[0], DiT.load(tmp_path / "five")[0])
    assert sorted(path.name for path in (tmp_path / "five").iterdir()) == FILES
    card = (tmp_path / "five" / "README.md").read_text()
    assert "scores: not known" in card and "1 classes: all" in card and "![" not in card


def test_exports_that_are_refused(monkeypatch, tmp_path, checkpoint, exported, capsys):
    def bad(folder, ckpt=checkpoint):
        return fails(monkeypatch, capsys, "sample.py", "--ckpt", ckpt, "--export", folder)

    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert "is there already: name a new folder" in bad(exported)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert "is there already" in bad(exported / "README.md")
    new = tmp_path / "new"
    assert "is for a checkpoint of train.py" in bad(new, exported)
    assert "there is no checkpoint" in bad(new, tmp_path / "none.pt")
    shutil.copy(checkpoint, tmp_path / "b.pt")
    (tmp_path / "b.jsonl").write_text("hello")
    assert "b.jsonl is no log of train.py" in bad(new, tmp_path / "b.pt")
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "model.safetensors needs pip install safetensors" in bad(new)
    assert "model.safetensors needs pip install safetensors" in bad(new, exported)
    assert not new.exists()


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_export_to_a_full_disk_is_one_line(tmp_path, checkpoint):
    pytest.importorskip("resource")
    needs("safetensors")
    command = ["sample.py", "--ckpt", checkpoint, "--export", tmp_path / "a"]
    status, _, err = python("-c", LIMITED, *command)
    assert status == 2 and err.count("\n") == 1 and "File too large" in err, err
    status, _, err = python(*command)  # under the same name
    assert status == 0 and len(list((tmp_path / "a").iterdir())) == 4, err


def test_damaged_and_foreign_folders_are_one_line(monkeypatch, tmp_path, exported, capsys):
    from safetensors.torch import load_file, save_file

    whole, weights = json.loads((exported / "config.json").read_text()), exported / FILES[2]
    state, raw = load_file(weights), weights.read_bytes()
    out = tmp_path / "keep.png"
    out.write_text("precious")

    def bad(config=whole):
        text = config if isinstance(config, str) else json.dumps(config)
        (exported / "config.json").write_text(text)
        line = fails(monkeypatch, capsys, "sample.py", "--ckpt", exported, "--out", out)
        assert out.read_text() == "precious" and len(line) < 500
        return line

    def changed(**other):
        return bad(whole | {"model": whole["model"] | other})

    wrong = "is damaged, or no generator of this code"
    assert "1000000000 blocks, and weights of 60 parameters" in changed(depth=10**9)
    for key in ("input_size", "hidden_size", "n_cls_tokens", "num_classes", "noise_classes"):
        assert wrong in changed(**{key: 10**9}), key
    for odd in (dict(depth="x"), dict(depth=-1), dict(num_heads=3), dict(num_heads=0), dict(a=1)):
        assert wrong in changed(**odd), odd
    for odd in ("", "{", "[1]", "\0", whole["model"], {"model": whole["model"]}):
        assert wrong in bad(odd)
    assert wrong in bad(whole | {"args": "x"})
    assert wrong in bad(whole | {"args": whole["args"] | {"alpha_max": "x"}})

    for cut in (raw[:-1], raw[: len(raw) // 2], raw[:5], b"", b"\xff" * 99, raw + b"\0"):
        weights.write_bytes(cut)
        assert wrong in bad()
    few = {name: value for name, value in state.items() if name != "pos_embed"}
    for other in (few, state | {"more": torch.ones(3)}, state | {"pos_embed": torch.ones(3)}):
        save_file(other, weights)
        assert wrong in bad()
    weights.unlink()
    assert "has no model.safetensors" in bad()
    assert Path(out).read_text() == "precious"


def test_weights_of_another_type_are_read(exported):
    """As hubs hold them, in half precision or twice that."""
    from safetensors.torch import load_file, save_file

    state = load_file(exported / "model.safetensors")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        save_file({k: v.to(dtype) for k, v in state.items()}, exported / "model.safetensors")
        net = DiT.load(exported)[0].eval()
        images = net.generate(torch.arange(2), 1.0, torch.Generator().manual_seed(0))
        assert images.isfinite().all() and images.std() > 0.1


def test_what_cannot_be_fetched_is_one_line(monkeypatch, tmp_path, capsys, hub):
    needs("safetensors")

    def bad(name):
        lines = [
            fails(monkeypatch, capsys, "sample.py", "--ckpt", name, "--out", tmp_path / "a.png"),
            fails(monkeypatch, capsys, "train.py", "--init", name, "--out", tmp_path / "a.pt"),
        ]
        assert lines[0].removeprefix("sample.py") == lines[1].removeprefix("train.py")
        return lines[0]

    (tmp_path / "empty").mkdir()
    assert "hf://me/empty has no config.json, as sample.py --export writes it" in bad(
        "hf://me/empty"
    )
    line = bad("hf://nobody/digits")
    assert "cannot download hf://nobody/digits (RuntimeError: 404: nobody of that name)" in line
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "hf://me/digits needs pip install huggingface_hub" in bad("hf://me/digits")
    assert not list(tmp_path.glob("a.*"))
