"""The block of Python that people copy runs as it stands; so do the notebook's cells."""

import re
import shutil

import pytest
import torch

from conftest import ASSETS, HERE, needs, start


def test_your_own_tensors():
    text, found = (HERE / "docs" / "recipes.md").read_text(), {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, found)
    c, y = torch.arange(100.0), torch.randn(100, 2)
    assert found["conditional_loss"](lambda z, c: z[..., :2] + c[..., None], c, y) > 1
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


def applied(diff, code):
    """code with a diff of the docs, whose parts are separated by @@ and occur once each."""
    for part in diff.split("@@\n"):
        lines = part.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        assert code.count(old) == 1 and len(lines) <= 10
        code = code.replace(old, "".join(line[1:] for line in lines if line[0] != "-"))
    return code


def test_forks(tmp_path):
    """The diffs of docs/fork.md apply; a generator of two convolutions trains and samples."""
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "assets").mkdir()
    shutil.copy(ASSETS / "digits.npz", tmp_path / "assets")
    text = (HERE / "docs" / "fork.md").read_text()
    for name, diff in re.findall(r"```diff\n--- (\S+)\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(applied(diff, (tmp_path / name).read_text()))
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with (tmp_path / "model.py").open("a") as file:
        file.write(block)
    for command in ("train.py --steps 2 --device cpu", "sample.py --ckpt out.pt --n 20"):
        with start(*command.split(), cwd=tmp_path) as job:
            assert job.wait(100) == 0
    weights = torch.load(tmp_path / "out.pt", weights_only=True)["ema"]
    assert weights["last.weight"].shape == (1, 64, 5, 5) and (tmp_path / "grid.png").exists()


def test_fields():
    """The diffs of docs/fields.md apply, and each gives another gradient, without NaN."""
    x, y, unc = torch.randn(2, 8, 3, requires_grad=True), torch.randn(2, 8, 3), torch.randn(2, 4, 3)
    code, gradients = (HERE / "drift.py").read_text(), []
    text = (HERE / "docs" / "fields.md").read_text()
    diffs = re.findall(r"```diff\n(.*?)```", text, re.DOTALL)
    for i, variant in enumerate([code, *(applied(diff, code) for diff in diffs)]):
        found = {}
        exec(variant.replace("drifting::", f"fields{i}::"), found)
        x.grad = None
        found["drift_loss"](x, y, unc)[0].backward()
        assert x.grad.isfinite().all()
        assert all((x.grad - other).abs().max() > 1e-4 for other in gradients)
        gradients.append(x.grad)
