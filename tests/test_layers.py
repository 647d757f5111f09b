"""Imports go only downward (see the table in docs/library.md)."""

import ast
from pathlib import Path

import paperlib

# Lowest first; a module imports from the lines above its own.
LAYERS = """
errors
lsun paths processes
checkpoints distances figures finite image_arrays likelihoods machine measures originals presets results
aggregate chain data elbo_figures fuzziness_figures gaussian pixelcnn
elbo_examples fuzziness_explorer pixelcnn_sampler resident train
features fuzziness_vae launch pixelvae_model sequential_networks
pixelvae_samples sequential_chain
sequential_model
sequential_samples
elbo fuzziness pixelvae pixelvae_figures sequential sequential_figures
reproduce
claims
quotes
report
"""
LAYER = {module: k for k, layer in enumerate(LAYERS.split("\n")) for module in layer.split()}
FILES = {path.stem: path for path in Path(paperlib.__file__).parent.glob("*.py") if path.stem != "__init__"}


def imported(path):
    """Modules of paperlib that the file imports, at its top or within a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "paperlib":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paperlib."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("paperlib."))
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name}: a relative import"


def test_every_module_has_a_layer():
    assert set(FILES) == set(LAYER)


def test_imports_go_downward():
    wrong = [
        f"{name} imports {other}"
        for name, path in FILES.items()
        for other in imported(path)
        if LAYER[other] >= LAYER[name]
    ]
    assert not wrong


def test_the_rule_is_seen_at_all():
    assert "presets" in set(imported(FILES["reproduce"])), "the parser finds no imports"
