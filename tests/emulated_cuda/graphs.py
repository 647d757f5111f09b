"""Graph capture: calls are written down, and `CUDAGraph.replay` makes them again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves


@dataclass
class CUDAGraph:
    """Calls on CPU tensors in order: the function, its arguments, and the tensors in which its results belong."""

    calls: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = field(default_factory=list)
    before: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # memory written while capturing, its copy
    fresh: list[Tensor] = field(default_factory=list)  # made while capturing

    def add(self, function: Callable[..., Any], args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """Call, for the shapes of the results, and write down the call. `written` are the arguments it changes."""
        for tensor in written:
            memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        result = function(*args, **kwargs)
        known = {memory_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        results = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        fresh = [tensor for tensor in results if memory_of(tensor) not in known]
        if written or fresh:  # a view is no work for the device
            self.calls.append((function, args, kwargs, results))
            self.fresh += fresh
        return result

    @torch.inference_mode()
    def forget(self) -> None:
        """As if nothing had run: what was written has its old values, and new memory holds no numbers."""
        for memory, copy in self.before.values():
            memory.copy_(copy)
        for tensor in self.fresh:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        self.before, self.fresh = {}, []

    @torch.inference_mode()
    def replay(self) -> None:
        with _disable_current_modes():  # the rules were checked while capturing
            for function, args, kwargs, results in self.calls:
                again = [tensor for tensor in tree_leaves(function(*args, **kwargs)) if isinstance(tensor, Tensor)]
                for old, new in zip(results, again, strict=True):
                    if old is not new:
                        old.copy_(new)


capturing: list[CUDAGraph] = []  # one at most


@contextmanager
def capture(graph: CUDAGraph) -> Iterator[None]:
    """In place of `torch.cuda.graph`."""
    capturing.append(graph)
    try:
        yield
    finally:
        capturing.pop().forget()


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
