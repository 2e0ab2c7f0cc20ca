"""The notebook: its file, and its cells run as they stand, but for those that need the network."""

import shutil

import log
from conftest import ASSETS, HERE, needs

NOTEBOOK = HERE / "drifting.ipynb"


def read_notebook():
    needs("nbclient")
    needs("ipykernel")
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(notebook):
    return [out for cell in notebook.cells for out in cell.get("outputs", [])]


def pictures(notebook):
    return sum("image/png" in out.get("data", {}) for out in outputs(notebook))


def test_notebook_file():
    notebook = read_notebook()
    assert NOTEBOOK.stat().st_size < 150_000
    for out in outputs(notebook):
        assert out.output_type in ("stream", "display_data")  # no error
        said = out.get("text", "")
        assert not [path for path in (HERE, "/home/", "/root/", "/tmp/") if str(path) in said]
    for cell in notebook.cells:
        asks = any(word in cell.source for word in ("hf://", "%pip", "git clone"))
        if cell.cell_type == "code":
            assert asks == ("network" in cell.metadata.get("tags", [])), cell.source


def test_notebook_runs(monkeypatch, tmp_path):
    notebook = read_notebook()
    stored = pictures(notebook)
    from nbclient import NotebookClient

    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "assets").mkdir()
    shutil.copy(ASSETS / "digits.npz", tmp_path / "assets")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    where = {"metadata": {"path": str(tmp_path)}}
    run = dict(kernel_name="python3", skip_cells_with_tag="network", timeout=600, resources=where)
    NotebookClient(notebook, **run).execute()  # raises if a cell does
    assert pictures(notebook) == stored == 6
    *_, last = log.read(tmp_path / "notebook" / "out.jsonl")
    assert last["fd"] < 2.5 and last["acc"] > 0.85  # after one step 46 and 0.10
    left = {path.name for path in tmp_path.iterdir() if path.suffix != ".py"}
    assert left <= {"assets", "ipython", "notebook", "__pycache__"}
