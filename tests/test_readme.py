"""The block of Python that people copy runs as it stands; so do the notebook's cells."""

import re
import shutil

import pytest
import torch

from conftest import ASSETS, HERE, needs, start


def test_your_own_tensors():
    [block] = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    found = {}
    exec(block, found)
    one_hot = torch.eye(3).unsqueeze(1).expand(3, 2000, 3)
    x = found["net"](torch.cat([torch.randn(3, 2000, 8), one_hot], dim=-1))
    torch.testing.assert_close(x.mean((1, 2)), torch.tensor([-4.0, 0, 4]), atol=0.3, rtol=0)
    assert x.std(1).mean().item() == pytest.approx(1, abs=0.25)


def test_notebook_runs(monkeypatch, tmp_path):
    """All cells but those that need a network."""
    needs("nbclient")
    needs("ipykernel")
    import nbformat
    from nbclient import NotebookClient

    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "assets").mkdir()
    shutil.copy(ASSETS / "digits.npz", tmp_path / "assets")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(HERE / "drifting.ipynb", as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, skip_cells_with_tag="network", resources=where).execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert sum("image/png" in out.get("data", {}) for out in shown) == 6


def test_forks(tmp_path):
    """The diffs of docs/fork.md apply; a generator of two convolutions trains and samples."""
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "assets").mkdir()
    shutil.copy(ASSETS / "digits.npz", tmp_path / "assets")
    text = (HERE / "docs" / "fork.md").read_text()
    for name, diff in re.findall(r"```diff\n--- (\S+)\n(.*?)```", text, re.DOTALL):
        code, lines = (tmp_path / name).read_text(), diff.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        assert code.count(old) == 1 and len(lines) <= 10
        new = "".join(line[1:] for line in lines if line[0] != "-")
        (tmp_path / name).write_text(code.replace(old, new))
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with (tmp_path / "model.py").open("a") as file:
        file.write(block)
    for command in ("train.py --steps 2 --device cpu", "sample.py --ckpt out.pt --n 20"):
        with start(*command.split(), cwd=tmp_path) as job:
            assert job.wait(100) == 0
    weights = torch.load(tmp_path / "out.pt", weights_only=True)["ema"]
    assert weights["last.weight"].shape == (1, 64, 5, 5) and (tmp_path / "grid.png").exists()
