"""Where a number comes from: code, versions, device and trainings."""

import ast
import hashlib
import importlib.metadata
import inspect
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from paperlib.system import files

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "matplotlib", "seaborn", "papermill")


def describe_code() -> dict[str, Any]:
    """Git revision of the code, and whether code, notebooks or pins differ from it; None where git does not know.

    A repository around ours, such as that of somebody's home, does not know.
    """
    watched = ["paperlib", "notebooks", "requirements.txt", "pyproject.toml"]
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != files.ROOT:
            return {"revision": None, "modified": None}
        revision = _git("rev-parse", "HEAD")
        modified = bool(_git("status", "--porcelain", "--", *watched))
    except (OSError, subprocess.CalledProcessError):
        return {"revision": None, "modified": None}
    return {"revision": revision, "modified": modified}


def source_hash(objects: Iterable[Any]) -> str:
    """Twelve hexadecimal digits that change with the code of `objects`, functions or classes.

    That is the whole module of what this library defines, with the modules of `paperlib.nn` that it imports; else the
    definition itself, or its bytecode where Python cannot show it, as in an interactive session; and the same of
    functions that a function has captured, with captured numbers and text. Comments, docstrings and layout do not
    count, nor do torch's own modules.
    """
    every = list(_with_captured(objects))
    modules = {one.__module__ for one in every if hasattr(one, "__module__")}
    densities = {name for module in modules for name in _densities(module or "")}
    digest = hashlib.sha256()
    for source in sorted({_source(one) for one in every} | {_module_source(name) for name in densities}):
        digest.update(source.encode() + b"\0")
    return digest.hexdigest()[:12]


def _with_captured(objects: Iterable[Any]) -> Iterator[Any]:
    for one in objects:
        yield one
        captured = (cell.cell_contents for cell in getattr(one, "__closure__", None) or ())
        plain = (bool, int, float, str)
        yield from _with_captured(value for value in captured if inspect.isfunction(value) or isinstance(value, plain))


def _source(one: Any) -> str:
    if not hasattr(one, "__module__"):
        return repr(one)
    name = one.__module__ or ""
    if name.startswith("torch."):
        return ""
    if name.startswith("paperlib."):
        return _module_source(name)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(one)))
    except (OSError, TypeError, SyntaxError):
        return f"{name} {_bytecode(one.__code__)}" if inspect.isfunction(one) else ""
    return f"{name} {_plain(tree)}"


def _module_source(name: str) -> str:
    return f"{name} {_plain(ast.parse(inspect.getsource(sys.modules[name])))}"


def _densities(name: str) -> set[str]:
    """The modules of `paperlib.nn` that a module of this library imports, and those that these import, by name."""
    if not name.startswith("paperlib."):
        return set()
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[name]))):
        if isinstance(node, ast.ImportFrom) and node.module == "paperlib.nn":
            found |= {f"paperlib.nn.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("paperlib.nn."):
            found.add(node.module)
    return found.union(*map(_densities, found))


def _plain(tree: ast.AST) -> str:
    """The code without docstrings, comments and layout."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.unparse(tree)


def _bytecode(code: CodeType) -> str:
    constants = [_bytecode(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_freevars} {constants}"


def describe_device(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} of {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a number may depend on; "not installed" for one that is absent."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # metadata do not say which build runs
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(*words: str) -> str:
    said = subprocess.run(["git", *words], cwd=files.ROOT, check=True, capture_output=True, encoding="utf-8")
    return said.stdout.strip()
