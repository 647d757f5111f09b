"""The committed notebooks: what can be said of them without running them (nbval runs them)."""

import ast
import json

import nbformat
import pytest

from paperlib.experiments import EXPERIMENTS
from paperlib.system import files

NOTEBOOKS = sorted(files.NOTEBOOKS.glob("*.ipynb"))
DEFAULTS = {"preset": "recorded", "seed": 0, "device": "auto", "overrides": {}}
EXEMPT = "nbval-ignore-output"

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_parameters_are_the_defaults_as_literals_with_help(path):
    (cell,) = (cell for cell in code_cells(path) if "parameters" in tags(cell))
    defaults = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    assert defaults == DEFAULTS
    assert all("  # " in line for line in cell.source.split("\n")), "papermill shows the comments as help"


def test_cells_are_short_and_leave_the_work_to_the_library(path):
    for cell in code_cells(path):
        assert len(cell.source.split("\n")) <= 15
        assert not any(line.rstrip().endswith(";") for line in cell.source.split("\n"))
        for node in ast.walk(ast.parse(cell.source)):
            kinds = (ast.FunctionDef, ast.ClassDef, ast.While, ast.If, ast.For, ast.Try)
            assert not isinstance(node, kinds), cell.source
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "/" not in node.value, f"a path in a cell: {node.value}"


def test_outputs_are_those_of_one_run_from_top_to_bottom_without_errors(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert len([o for o in outputs if "image/png" in o.get("data", {})]) >= 3


def test_every_cell_is_compared(path):
    assert not [cell for cell in code_cells(path) if EXEMPT in tags(cell)]


def test_the_file_is_clean_and_an_experiment_is_behind_it(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3" and "papermill" not in notebook["metadata"]
    assert all(set(cell["metadata"]) <= {"tags"} for cell in notebook["cells"])
    assert str(files.ROOT) not in path.read_text()
    assert set(EXPERIMENTS[path.stem].presets) == {"smoke", "cpu", "gpu", "paper"}
