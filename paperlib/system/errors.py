"""Mistakes that a reader can mend, said in one line."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something outside the code is wrong: the message says what, where, and what to do about it."""

    def _render_traceback_(self) -> list[str]:
        """IPython shows this in place of a traceback, so a notebook ends with the one line that matters."""
        return [f"UserError: {self}"]


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit: 0 or its return value, 2 with one line for a `UserError`, 130 if interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # where the locale cannot say a letter, another form of it
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our words has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
