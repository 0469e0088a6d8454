"""The notebook of ``experiments/`` runs from the first cell to the last, quickly; what it gives is stored with it."""

import json
import re
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "experiments" / "quickstart.ipynb"
SECONDS = 60  # that the prose promises on an idle machine; four times as much before the test gives up


def kinds(cells):
    """What each cell of code gives: text that is printed, tables, pictures."""
    return [
        [sorted(output.get("data", {output.get("name"): ""})) for output in cell["outputs"]]
        for cell in cells
        if cell["cell_type"] == "code"
    ]


def test_the_outputs_of_one_clean_run_are_stored_and_name_no_machine():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    given = [output for cell in cells for output in cell["outputs"]]
    texts = [json.dumps({k: v for k, v in o.get("data", o).items() if k != "image/png"}) for o in given]
    assert sum("image/png" in o.get("data", {}) for o in given) == 4
    assert not any(o["output_type"] == "error" or o.get("name") == "stderr" for o in given)
    assert not [text for text in texts if re.search(r"/(home|root|tmp|work|Users)/", text)]


def test_the_new_method_is_short():
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"]]
    (method,) = (text for text in cells if "(Strategy):" in text)
    assert "(Client):" in method and len([line for line in method.splitlines() if line.strip()]) < 30


@pytest.mark.nightly
@pytest.mark.timeout(5 * SECONDS)
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel, the kernel that runs the notebook, is not installed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    started = time.perf_counter()
    nbclient.NotebookClient(
        notebook, timeout=2 * SECONDS, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert time.perf_counter() - started < 4 * SECONDS
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    errors = [output for output in outputs if output.get("name") == "stderr"]
    assert errors == []
    assert kinds(notebook.cells) == kinds(json.loads(NOTEBOOK.read_text())["cells"])
    runs = sorted(path.parent.parent.name for path in (tmp_path / "runs").rglob("summary.json"))
    assert runs == ["default", "quickstart", "quickstart", "quickstart"]
