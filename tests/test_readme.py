"""The block of Python that people copy runs as it stands; so do the notebook's cells."""

import re
import shutil

import pytest
import torch

from conftest import ASSETS, HERE, needs


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
