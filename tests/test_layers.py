"""The import rule: commands -> chapters -> stats -> {data, nn, runs} -> system. No chapter imports another, and what
measures, decides or trains never imports what draws."""

import ast
import json
from pathlib import Path

import paperlib
from paperlib.system import files

CHAPTERS = {"elbo", "fuzziness", "sequential", "pixelvae"}
SHARED = {"data", "nn", "runs"}
BELOW_STATS = {*SHARED, "system"}
MAY_IMPORT = {
    **{name: {"experiments", *CHAPTERS, "stats", *BELOW_STATS} for name in ("reproduce", "report", "experiments")},
    "__init__": {"pretrained"},
    "pretrained": {*CHAPTERS, "system"},
    "sample": {"pretrained", *BELOW_STATS},
    **{name: {"stats", *BELOW_STATS} for name in CHAPTERS},
    "stats": BELOW_STATS,
    **{name: {"system"} for name in SHARED},
    "system": set(),
}
DRAWS = {"figures", "plotting"}
MAY_DRAW = {"__init__", "figures", "explorer"}


def imported(code):
    """Modules of paperlib that `code` imports, at its top or within a function, as tuples of their parts."""
    for node in ast.walk(ast.parse(code)):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (tuple(name.split(".")[1:]) for name in names if name.startswith("paperlib."))


def test_imports_go_downward():
    home = Path(paperlib.__file__).parent
    count, wrong = 0, []
    for path in home.rglob("*.py"):
        place = path.relative_to(home)
        room = place.parts[0].removesuffix(".py")
        for parts in imported(path.read_text()):
            count += 1
            may_draw = room not in CHAPTERS or path.stem in MAY_DRAW
            if parts[0] not in MAY_IMPORT[room] | {room} or (DRAWS & {*parts} and not may_draw):
                wrong.append(f"{place} imports {'.'.join(parts)}")
    assert not wrong
    assert count > 200, "the parser sees the imports"


def test_a_notebook_imports_its_chapter_alone():
    for path in sorted(files.NOTEBOOKS.glob("*.ipynb")):
        code = [cell["source"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        modules = {parts for source in code for parts in imported("".join(source))}
        assert len(modules) == 1 and modules <= {(chapter,) for chapter in CHAPTERS}, path.stem
