"""The notebooks: executed as they stand, in a kernel without a network; .py and .ipynb are one text."""

import os
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from support.offline import OFFLINE
from support.paths import ROOT
from support.real import real_policy

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REAL = ROOT / "notebooks" / "04_your_own_run.ipynb"
OTHERS = [path for path in NOTEBOOKS if path != REAL]
MOST_CELLS = 40

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def execute(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, executed in `folder` by a kernel of this Python."""
    notebook.cells.insert(0, new_code_cell(OFFLINE))
    client = NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}})
    return client.execute()


@pytest.fixture(autouse=True)
def kernel(monkeypatch, tmp_path):
    """Kernels, connection files and histories of this test alone; no thread waits for another."""
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """One folder for all notebooks, as a reader has it: what one has run, the next one reads."""
    return tmp_path_factory.mktemp("desk")


@pytest.mark.slow
@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, desk):
    """Its assertions are its claims."""
    runs(path, desk)


@pytest.mark.slow
def test_the_notebook_of_a_real_run_runs(desk):
    real_policy()
    runs(REAL, desk)


def runs(path: Path, folder: Path) -> None:
    done = execute(nbformat.read(path, as_version=4), folder)
    code = [cell for cell in done.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not re.search(r"\bnan\b", "".join(str(cell.outputs) for cell in code).lower())


def test_a_failing_cell_and_a_connection_are_found(tmp_path):
    for source in (
        "assert 1 + 1 == 3",
        "import socket; socket.create_connection(('192.0.2.1', 80), 1)",
    ):
        with pytest.raises(CellExecutionError, match=r"AssertionError|Refused"):
            execute(new_notebook(cells=[new_code_cell(source)]), tmp_path)


@each
def test_both_files_of_a_pair_have_the_same_cells(path):
    of_ipynb, of_py = (jupytext.read(path.with_suffix(suffix)).cells for suffix in (".ipynb", ".py"))
    assert [(cell.cell_type, cell.source) for cell in of_ipynb] == [
        (cell.cell_type, cell.source) for cell in of_py
    ]


@each
def test_a_notebook_is_stored_without_outputs_and_places(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert 10 < len(notebook.cells) < MOST_CELLS
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count or cell.metadata for cell in code)
    assert set(notebook.metadata) == {"jupytext", "kernelspec"}
    assert sum("assert " in cell.source for cell in code) >= 3
    text = path.read_text(encoding="utf-8") + path.with_suffix(".py").read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|usr)/", text)


def test_every_notebook_is_there():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]
    assert {path.stem for path in NOTEBOOKS} == {
        path.stem for path in (ROOT / "notebooks").glob("*.py")
    }
