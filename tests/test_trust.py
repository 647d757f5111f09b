"""What ruff's security rules do not see: nothing of others is unpickled, run by a shell, or downloaded unchecked."""

import ast
import json

from paperlib.data import downloads
from paperlib.system import files

SOURCES = sorted([*(files.ROOT / "paperlib").rglob("*.py"), *(files.ROOT / "benchmarks").glob("*.py")])
CALLS = [
    (path.name, ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords})
    for path in SOURCES
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Call)
]


def test_reading_a_file_runs_no_code_from_it():
    assert {words.get("weights_only") for _, name, words in CALLS if name == "torch.load"} == {"True"}
    assert {words.get("allow_pickle", "False") for _, _, words in CALLS} == {"False"}


def test_only_sets_with_checksums_are_downloaded():
    assert {name for name, _, words in CALLS if "download" in words} == {"downloads.py"}
    for path in SOURCES:
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        names = {alias.name for node in nodes for alias in node.names} | {getattr(node, "module", "") for node in nodes}
        network = {"urllib", "requests", "http", "ftplib"} & {(name or "").split(".")[0] for name in names}
        assert not network, f"{path.name}: torchvision downloads, and checks"
    datasets = downloads._torchvision().datasets
    assert all(len(checksum) == 32 for _, checksum in datasets.MNIST.resources)
    assert all(len(checksum) == 32 for _, checksum in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list)
    assert len(datasets.CIFAR10.tgz_md5) == 32


def test_notebooks_run_no_shell():
    for path in sorted(files.NOTEBOOKS.glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        for code in ("".join(cell["source"]) for cell in cells):
            ast.parse(code)  # a line magic or `!command` is no Python
            assert not any(word in code for word in ("subprocess", "os.system", "get_ipython"))
