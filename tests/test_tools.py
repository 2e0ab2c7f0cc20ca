"""The tools, on problems so small that they take no time."""

import json
from dataclasses import asdict

import torch

import model
from conftest import needs, tiny_generator
from tools import bench, judge

SMALL = ["--size", "8", "--patch", "4", "--labels", "2", "--n_gen", "4", "--n_pos", "3"]


def test_bench(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SHAPES", [(2, 4, 4, 2, 8), (1, 8, 8, 0, 8)])
    bench.main([*SMALL, "--encoder", "pixels", "pool:2"])
    first, second, header, *steps = capsys.readouterr().out.splitlines()
    assert first.startswith("drift_loss (2, 4, 4, 2, 8): ") and "(1, 8, 8, 0, 8)" in second
    assert "generator" in header and len(steps) == 4
    assert all(len(line.split()) == 5 for line in steps)


def test_plot(tmp_path):
    needs("matplotlib")
    from PIL import Image

    from tools import plot

    log = [{"dataset": "digits", "torch": "2.0"}, {"real_fd": 5.0, "real_drift_0.05": 1e-3}]
    log += [{"images": 10, "drift_0.05": 2.0, "images_per_s": 9.0, "scale": 1.0}]
    log += [{"images": 20, "drift_0.05": 1.0, "images_per_s": 9.5}]
    log += [{"images": 20, "fd": 50.0, "acc": 0.5, "std": float("nan")}]
    running, done = tmp_path / "running.jsonl", tmp_path / "done.jsonl"
    running.write_text("\n".join(map(json.dumps, log[:4])))
    done.write_text("\n".join(map(json.dumps, log)))
    plot.main([str(running), "--out", str(tmp_path / "one.png")])
    plot.main([str(running), str(done), "--out", str(tmp_path / "two.png")])
    one, two = Image.open(tmp_path / "one.png"), Image.open(tmp_path / "two.png")
    assert one.size == two.size == (1200, 700) and one.tobytes() != two.tobytes()


def test_hub_gives_back_what_it_was_given(tmp_path):
    needs("huggingface_hub")
    needs("safetensors")
    from tools import hub

    net = tiny_generator()
    config, classes = asdict(net.config), [f"class {i}" for i in range(10)]
    ema = {name: torch.randn_like(value) for name, value in net.state_dict().items()}
    old = dict(model=net.state_dict(), ema=ema, config=config, classes=classes, step=7, args={})
    torch.save(old, tmp_path / "out.pt")

    hub.main(["save", str(tmp_path / "out.pt"), str(tmp_path / "folder")])
    files = {path.name: path for path in (tmp_path / "folder").iterdir()}
    assert "model.safetensors" in files
    assert json.loads(files["config.json"].read_text()) == config | {"classes": classes}

    hub.main(["load", str(tmp_path / "folder"), str(tmp_path / "new.pt")])
    net, _ = model.load(tmp_path / "out.pt")
    _, new = model.load(tmp_path / "new.pt")
    assert new["config"] == config and new["classes"] == classes
    assert new["step"] == 0 and new["args"] == {}
    for weights in (new["ema"], new["model"], net.state_dict()):
        assert weights.keys() == ema.keys()
        assert all(torch.equal(value, ema[name]) for name, value in weights.items())


def test_judge():
    net = judge.Classifier().eval()
    images = torch.randint(256, (600, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(600) % 10
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.zero_()
        net.head.bias[3] = 9.0  # it sees a three in all
    line = judge.scores(net, images, labels, images.flip(0))
    assert "0.0  accuracy 0.100  unsure 0.0 of 1,000" in line
    net.head.bias.data.zero_()  # or nothing
    assert "unsure 1000.0 of" in judge.scores(net, images, labels, images)
