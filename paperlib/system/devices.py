"""What a long computation needs around it: device, compiler, memory, Ctrl-C, progress."""

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from paperlib.system.errors import UserError

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C; a scheduler's word; a terminal that was closed


def pick_device(name: str) -> torch.device:
    """The device called "auto" (CUDA where there is one), "cpu", "cuda" (under torchrun this process's) or "cuda:N".

    On CUDA float32 is float32 from then on: cuDNN's default, TF32, moves the PixelVAE's likelihood by 0.64 nats per
    image. Raises `UserError` for another name, and for a CUDA device that is not there.
    """
    if not isinstance(name, str):
        raise UserError(f"device is {name!r}, but takes text: auto, cpu, cuda or cuda:N (papermill: -r device cuda:0)")
    kind, colon, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and (kind != "cuda" or not number.isdecimal())):
        raise UserError(f"unknown device {name!r}: choose auto, cpu, cuda or cuda:N")
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" or (kind == "auto" and not available):
        return torch.device("cpu")
    index = int(number or os.environ.get("LOCAL_RANK", 0))
    if index >= available:
        raise UserError(f"device {name!r}: torch sees {available} CUDA devices; use auto or cpu")
    torch.backends.cudnn.allow_tf32 = False  # for products that is the default
    return torch.device("cuda", index)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`; a GPU copies it by itself, from pinned memory, and nothing waits for it."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which training runs its loss: bfloat16 autocast, or nothing for "float32".

    Without its cache: in torch 2.8 and 2.9 weights that were first cast under `no_grad` get no gradient from it.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)


def compiled(model: nn.Module) -> nn.Module:
    """`model` under `torch.compile`, with the same parameters; itself, with a line on stderr, where that fails."""
    chosen = os.environ.get("CXX")
    names = [chosen] if chosen else ["g++", "clang++", "c++"]
    compiler = next((name for name in names if shutil.which(name)), None)
    if compiler is None:
        print("no C++ compiler (install g++ or set CXX): running uncompiled, slower", file=sys.stderr)
        return model
    os.environ["CXX"] = compiler  # where torch looks
    if not _compiles(next(model.parameters()).device.type):
        return model
    torch.compiler.reset()  # else the ninth model of a process, of another shape each, runs uncompiled
    return torch.compile(model)


@lru_cache
def _compiles(device: str) -> bool:
    """Whether torch compiles on this type of device, tried once on one line; a line on stderr says why not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # a compiler, its headers or its folder fail in as many ways
        reason = " ".join(str(error).split())[:200]
        print(
            f"torch cannot compile here ({type(error).__name__}: {reason}): running uncompiled, slower", file=sys.stderr
        )
        return False
    return True


@contextmanager
def seeded(seed: int, device: torch.device | str) -> Iterator[None]:
    """Within, torch's global generators start from `seed`; their states from before come back."""
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def stream(seed: int, number: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each purpose, by `number`, so that one measurement does not change another."""
    return torch.Generator(device).manual_seed(1000 * seed + number)


@contextmanager
def oom_as_user_error(advice: str) -> Iterator[None]:
    """Within, running out of memory is a `UserError` that ends with `advice`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = str(error).lower()
        if isinstance(error, MemoryError) or "can't allocate memory" in said or "out of memory" in said:
            raise UserError(f"out of memory: {advice}") from error
        raise


@contextmanager
def interrupt_deferred() -> Iterator[list[int]]:
    """Within, the first of STOPS is noted in the list yielded, for the caller to end where its state is whole.

    A second one raises. Outside the main thread, and for signals that are ignored, nothing changes.
    """
    asked: list[int] = []

    def note(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("stopping after this step (again: at once, unsaved)", file=sys.stderr)

    numbers = STOPS if threading.current_thread() is threading.main_thread() else ()
    heard = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(name: str, step: int, steps: int, hidden: bool = False) -> Iterator[Callable[..., None]]:
    """A bar on stderr, from `step` to `steps`; TQDM_DISABLE=1 hides it.

    Yields `show(step, elapsed, numbers, force=False)`, to be called after each step, with `elapsed` in seconds and a
    function `numbers` that returns floats by name, "loss" among them. Where PAPERLIB_PROGRESS names a file, that is
    replaced in place of a bar, at most once a second, with JSON for another process to draw. `hidden` turns off both.
    """
    target = os.environ.get("PAPERLIB_PROGRESS")
    partial = Path(f"{target}.{os.getpid()}.partial")
    pause, drawn = (1.0 if target else 5.0), -math.inf
    disable = {"disable": True} if target or hidden else {}  # otherwise TQDM_DISABLE decides

    def show(step: int, elapsed: float, numbers: Callable[[], dict[str, float]], force: bool = False) -> None:
        nonlocal drawn
        if hidden:
            return
        if force or time.monotonic() - drawn >= pause:
            drawn, shown = time.monotonic(), numbers()
            if target:
                content = {"name": name, "step": step, "steps": steps, "loss": shown["loss"], "elapsed": elapsed}
                with suppress(OSError):  # a lost bar must not end the computation
                    partial.write_text(json.dumps(content), encoding="utf-8")
                    os.replace(partial, target)
            bar.set_postfix({key: f"{value:.4g}" for key, value in shown.items()}, refresh=False)
        bar.update(step - bar.n)

    with tqdm(total=steps, initial=step, desc=name, mininterval=5, **disable) as bar:
        yield show
