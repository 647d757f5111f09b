"""What the host waits for, and where in the code."""

import sys
from collections import Counter
from pathlib import Path

from paperlib.system import files

OURS = Path(__file__).parent
waits: Counter[str] = Counter()  # by what the host waits for, and the place


class CaptureError(RuntimeError):
    """What CUDA says of work that cannot be captured."""


def wait(what: str, capturing: bool) -> None:
    """Count one wait of the host for the device. Raises `CaptureError` where a graph is captured."""
    if capturing:
        raise CaptureError(f"{what} while a graph is captured, at {place()}")
    waits[f"{what} at {place()}"] += 1


def place() -> str:
    """The innermost line of the library that is being run, or else of what uses torch."""
    frame, outside = sys._getframe(1), "?"
    while frame:
        path = Path(frame.f_code.co_filename)
        line = f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        if path.is_relative_to(files.ROOT / "paperlib"):
            return line
        if outside == "?" and OURS not in path.parents and "torch" not in path.parts:
            outside = line
        frame = frame.f_back
    return outside
