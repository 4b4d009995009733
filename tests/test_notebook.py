"""The example notebook runs in a kernel of its own, and shows what it says."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FILE = ROOT / "examples" / "finetune.ipynb"


def shown(cell: dict, kind: str = "text/plain") -> str:
    """What a notebook shows for the value of a cell, without what the cell prints."""
    return "".join(each["data"].get(kind, "") for each in cell["outputs"] if each["output_type"] == "execute_result")


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(FILE, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    cells = {cell["id"]: cell for cell in notebook.cells}
    first, last = map(
        float, re.match(r"History\(80 iterations, loss (\S+) -> (\S+), best", shown(cells["train"])).groups()
    )
    assert last < 0.2 * first
    assert "43 44 45" not in shown(cells["before"]) and "43 44 45" in shown(cells["after"])
    assert len(shown(cells["plot"], "image/png")) > 10_000  # base64
    assert "val_loss" in shown(cells["table"], "text/html")


def test_it_is_saved_without_results() -> None:
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.get("outputs", []) == [] for cell in notebook.cells)
    assert FILE.stat().st_size < 8_000
