"""Kernels that run our code and nobody's configuration: what the runner and the tests give to each."""

import os
import sys
from pathlib import Path

from paperlib.system import files


def environment(folder: Path) -> dict[str, str]:
    """The variables of a kernel whose own configuration, empty, lies in `folder`.

    It imports paperlib from where this process has it. A user's profile of IPython or matplotlibrc would change the
    figures, and a home that cannot be written would add notices to outputs. A kernel chooses its own backend only where
    MPLBACKEND is not set, which the caller sees to.
    """
    paths = [str(files.ROOT), os.environ.get("PYTHONPATH")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "MATPLOTLIBRC": os.devnull,
        **{name: str(folder / name.lower()) for name in ("MPLCONFIGDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR")},
    }


def install(folder: Path) -> dict[str, str | None]:
    """Write a kernel `python3` of this interpreter and the `environment` into `folder`.

    Returns the variables, None for one to be without, that make Jupyter take it before all others, and it a backend of
    its own.
    """
    words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": words, "display_name": "Python 3", "language": "python", "env": environment(folder)}
    files.write_json(folder / "kernels" / "python3" / "kernel.json", spec)
    runtime = {"JUPYTER_RUNTIME_DIR": spec["env"]["JUPYTER_RUNTIME_DIR"]}
    return {"JUPYTER_PATH": str(folder), "MPLBACKEND": None} | runtime
