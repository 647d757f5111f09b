"""Tensors on the emulated device, and the rules for what is done with them."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from emulated_cuda import graphs, host

DEVICE = torch.device("cuda", 0)

# Operations whose results, or their shapes, the host reads.
READ_BY_HOST = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "repeat_interleave"}
READ_BY_HOST |= {"_unique2", "unique_dim", "unique_consecutive", "_linalg_check_errors"}
INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
FILLS = {"fill", "fill_", "masked_fill", "masked_fill_", "index_put", "index_put_", "_index_put_impl_"}


class DeviceError(RuntimeError):
    """What CUDA says of tensors or generators on several devices."""


class CudaTensor(Tensor):
    """Says cuda:0; its values are those of the CPU tensor `inner`."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "CudaTensor":
        options = {"dtype": inner.dtype, "layout": inner.layout, "device": DEVICE}
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        with torch.inference_mode(inner.is_inference()):
            tensor = Tensor._make_wrapper_subclass(cls, inner.size(), **place, **options)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    # What torch has in Python or reads from memory:

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy, at {host.place()}")
        return self.detach().cpu().numpy()

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __format__(self, spec: str) -> str:
        return format(self.cpu() if self.ndim else self.item(), spec)

    def __repr__(self) -> str:
        return f"CudaTensor({self.inner!r})"

    def __reduce_ex__(self, protocol: int) -> Any:  # a checkpoint holds the values
        return self.inner.detach().clone().__reduce_ex__(protocol)


class Rules(TorchDispatchMode):
    """Within, all of torch follows `run`, and tensors can be made on the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


RULES = Rules()
claimed: dict[int, str] = {}  # the type of device that a generator was made for, by its address


def run(function: Any, args: Any, kwargs: Any) -> Any:
    """The CPU's result of one operation of torch, on the device where CUDA has it."""
    if _is_composite(function):
        with RULES:
            return function.decompose(*args, **kwargs)
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    on_gpu, device = [one for one in tensors if isinstance(one, CudaTensor)], kwargs.get("device")
    if function is torch.ops.aten.copy_.default:
        device = args[0].device
    target = torch.device(device).type if device is not None else "cuda" if on_gpu else "cpu"
    _check_generators(function, leaves, target)
    if target == "cpu" and not on_gpu:
        return function(*args, **kwargs)

    written = _written(function, args, kwargs)
    _check_devices(function, args, tensors, written)
    _count_waits(function, args, kwargs, target)
    outer = {id(one.inner): one for one in on_gpu}
    args, kwargs = tree_unflatten([_inner(leaf) for leaf in leaves], structure)
    kwargs |= {name: value for name, value in (("device", "cpu"), ("pin_memory", False)) if name in kwargs}
    if graphs.capturing:
        result = graphs.capturing[0].add(function, args, kwargs, [_inner(one) for one in written])
    else:
        result = function(*args, **kwargs)

    def on_target(value: Any) -> Any:
        if target == "cpu" or not isinstance(value, Tensor):
            return value
        return outer[id(value)] if id(value) in outer else CudaTensor(value)

    return on_target(result) if isinstance(result, Tensor) else tree_map(on_target, result)


@cache
def _is_composite(function: Any) -> bool:
    """Whether torch makes it of other operations."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")


@cache
def _name(function: Any) -> str:
    return function._schema.name.removeprefix("aten::")


@cache
def _places_written(function: Any) -> list[tuple[int, str]]:
    return [(k, one.name) for k, one in enumerate(function._schema.arguments) if one.is_write]


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, CudaTensor) else value


def _written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that a function changes."""
    values = [args[k] if k < len(args) else kwargs.get(name) for k, name in _places_written(function)]
    return [one for one in tree_leaves(values) if one is not None]


def _check_generators(function: Any, leaves: list[Any], target: str) -> None:
    for leaf in leaves:
        if isinstance(leaf, torch._C.Generator) and (kind := claimed.get(leaf._cdata, "cpu")) != target:
            raise DeviceError(f"{_name(function)} on {target} with a generator for {kind}, at {host.place()}")


def _check_devices(function: Any, args: Any, tensors: list[Tensor], written: list[Tensor]) -> None:
    """Only copies take tensors of both devices; what works by elements or fills takes numbers from the CPU."""
    if _name(function) in INDEXED and isinstance(args[0], CudaTensor):
        tensors = [args[0], *args[2:3]]  # indices may be on the CPU
    on_cpu = [one for one in tensors if not isinstance(one, CudaTensor)]
    if len(on_cpu) in (0, len(tensors)) or _name(function) == "copy_":
        return
    by_elements = torch.Tag.pointwise in function.tags or _name(function) in FILLS
    numbers = all(not one.ndim for one in on_cpu)
    if not (by_elements and numbers) or not all(isinstance(one, CudaTensor) for one in written):
        raise DeviceError(f"{_name(function)} of tensors on cpu and cuda, at {host.place()}")


def _count_waits(function: Any, args: Any, kwargs: Any, target: str) -> None:
    """The waits of the host for one operation, and in a graph what cannot be captured."""
    name, capturing = _name(function), bool(graphs.capturing)
    if name in ("_to_copy", "copy_"):
        source = args[name == "copy_"]
        alone = getattr(source, "pinned", False) and kwargs.get("non_blocking")
        if isinstance(source, CudaTensor) != (target == "cuda") and not alone:
            host.wait(f"a copy to {target}", capturing)
    if name in READ_BY_HOST:
        host.wait(name, capturing)
    if name in INDEXED:
        indices = [one for one in args[1] if one is not None]
        if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
            host.wait("a mask as index", capturing)
        if not all(isinstance(one, CudaTensor) for one in (*indices, *args[2:3])):
            host.wait(f"a copy to {target}", capturing)
    if capturing and torch.Tag.nondeterministic_seeded in function.tags:
        raise host.CaptureError(f"{name} draws while a graph is captured, at {host.place()}")
