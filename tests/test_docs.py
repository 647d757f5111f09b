"""docs/library.md: its tree is the library's, and its examples run."""

import re

import pytest

from paperlib.system import files

TEXT = (files.ROOT / "docs" / "library.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_tree_names_every_module():
    tree, _, _ = TEXT.split("```\n")[1].partition("```")
    found, folder = set(), ""
    for line in tree.splitlines()[1:]:
        name, depth = line.split()[0], len(line) - len(line.lstrip())
        if name.endswith("/"):
            folder = name
        else:
            found.add(name if depth == 2 else folder + name)
    home = files.ROOT / "paperlib"
    modules = {path.relative_to(home).as_posix() for path in home.rglob("*.py") if not path.stem.startswith("__")}
    assert found == modules


@pytest.mark.parametrize("code", EXAMPLES, ids=["sampler", "aggregate posterior"])
def test_an_example_runs(code, capsys):
    assert len([line for line in code.splitlines() if line]) <= 8
    exec(compile(code, "docs/library.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out
