"""Nothing of others is run: no pickle but torchvision's checksummed archives, no shell, no unchecked download."""

import ast
import json

import pytest

from paperlib.data import downloads
from paperlib.system import files

SOURCES = sorted([*(files.ROOT / "paperlib").glob("*.py"), *(files.ROOT / "benchmarks").glob("*.py")])
NOTEBOOKS = sorted(files.NOTEBOOKS.glob("*.ipynb"))


def calls(path):
    """(dotted name, keywords) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def imported(path):
    """First parts of all names that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_module_runs_nothing_that_it_reads(path):
    for name, words in calls(path):
        assert name not in {"eval", "exec", "compile", "os.system", "os.popen", "pickle.loads"}, name
        assert words.get("shell", "False") == "False", f"{name} by a shell"
        assert words.get("allow_pickle", "False") == "False", f"{name} reads pickles"
        assert name != "torch.load" or words.get("weights_only") == "True", "torch.load without weights_only"
        assert name != "pickle.load" or path.stem == "lsun", "lsun reads what its own child process writes"
        assert name != "pickle.dump" or path.stem == "lsun"
    network = {"urllib", "requests", "http", "ftplib"} & set(imported(path))
    assert not network, "torchvision downloads, and checks"


def test_only_sets_with_checksums_are_downloaded():
    asking = [(path.stem, words) for path in SOURCES for _, words in calls(path) if "download" in words]
    assert [stem for stem, _ in asking] == ["originals"]
    datasets = downloads._torchvision().datasets
    assert all(len(checksum) == 32 for _, checksum in datasets.MNIST.resources)
    assert all(len(checksum) == 32 for _, checksum in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list)
    assert len(datasets.CIFAR10.tgz_md5) == 32


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_no_shell(path):
    code = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in code:
        ast.parse(cell)  # a line magic or `!command` is no Python
        for word in ("subprocess", "os.system", "get_ipython", "eval(", "exec("):
            assert word not in cell
