"""docs/library.md: its tree is the library's, and its examples run."""

import re

import pytest

from paperlib.system import files

TEXT = (files.ROOT / "docs" / "library.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)

TREE = TEXT.split("```\n")[1].splitlines()[1:]


def listed():
    """The modules of the tree, as paths below paperlib/."""
    folder = ""
    for line in TREE:
        name, depth = line.split()[0], len(line) - len(line.lstrip())
        if name.endswith("/"):
            folder = name
        else:
            yield name if depth == 2 else folder + name


def test_the_tree_says_something_of_exactly_the_modules_that_exist():
    home = files.ROOT / "paperlib"
    modules = [path.relative_to(home).as_posix() for path in home.rglob("*.py") if not path.stem.startswith("__")]
    assert sorted(listed()) == sorted(modules)
    assert all(len(line.split()) > 1 and len(line) <= 120 for line in TREE)


@pytest.mark.parametrize("code", EXAMPLES, ids=["pretrained", "sampler", "aggregate posterior"])
def test_an_example_is_short_and_runs(code, capsys):
    assert len([line for line in code.splitlines() if line]) <= 8
    exec(compile(code, "docs/library.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out
