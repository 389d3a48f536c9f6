"""The notebooks run from top to bottom, with the packaged model in place of a public one and without the install."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

COLAB = Path(__file__).parents[2] / "colab"
NOTEBOOKS = sorted(path.stem for path in COLAB.glob("*.ipynb"))
# It asks all questions of `reproduce`, which tests/evals covers, and takes as long as the others together.
SLOW = {"does_it_hold_on_my_model"}
SECONDS = 600  # per cell, on two cores that run other tests too


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(COLAB / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NOTEBOOKS]
)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RAZOR_JAX_MODEL", "razor-mini")
    monkeypatch.setenv("RAZOR_JAX_QUICK", "1")
    monkeypatch.setenv("RAZOR_JAX_WINDOW", "128")
    monkeypatch.setenv("RAZOR_JAX_REPRODUCE", "--tokens 512 --documents 2")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("XLA_FLAGS")  # the models are real, and slow without a compiler that optimises
    notebook = read(name)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output
    )
    if name == "ask_a_long_document":
        assert printed.count("dense  right") == printed.count("Razor  right") == 4, printed


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stored_without_outputs_and_says_where_to_run(name):
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert f"colab/{name}.ipynb" in notebook.cells[0].source
    assert "v5e-1" in notebook.cells[0].source
    # JAX is imported after the install cell only: then no restart is needed.
    assert "install" in code[0].metadata["tags"]
    assert "jax" not in [
        line.split()[1].split(".")[0] for line in code[0].source.splitlines() if line.startswith("import ")
    ]
    for cell in code:
        compile(cell.source, name, "exec")
