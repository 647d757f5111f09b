"""Parts of torch that know of CUDA, replaced by what the emulated device needs."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from emulated_cuda import graphs, host, tensors

true_tensor = torch.tensor


class Generator(torch._C.Generator):
    """Draws what the CPU would, but only on the device that it is made for."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        generator = super().__new__(cls, "cpu")
        tensors.claimed[generator._cdata] = torch.device(device).type
        return generator

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return torch.device(tensors.claimed[self._cdata])


class Stream:
    """There is one, in which everything is done at once."""

    def wait_stream(self, other: "Stream") -> None:
        pass

    def synchronize(self) -> None:
        host.wait("synchronize", bool(graphs.capturing))


def pin_memory(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.pinned = True
    return copy


def tensor(data: Any, **options: Any) -> Tensor:
    """`torch.tensor`, which reads the numbers of a list in C++, where no rule applies."""
    if isinstance(data, (list, tuple)):
        data = tree_map(lambda one: one.item() if isinstance(one, tensors.CudaTensor) else one, data)
    return true_tensor(data, **options)


CUDA = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "device": lambda device: nullcontext(),
    "get_device_name": lambda device=None: "an emulated device",
    "is_bf16_supported": lambda *_, **__: True,
    "manual_seed": lambda seed: None,  # the default generator is that of the CPU
    "manual_seed_all": lambda seed: None,
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "set_rng_state": lambda state, device="cuda": None,
    "synchronize": lambda device=None: Stream().synchronize(),
    "current_stream": lambda device=None: Stream(),
    "stream": lambda stream: nullcontext(),
    "Stream": Stream,
    "CUDAGraph": graphs.CUDAGraph,
    "graph": graphs.capture,
}


def install() -> None:
    """Make cuda:0 the emulated device in this process, for good."""
    for name, value in CUDA.items():
        setattr(torch.cuda, name, value)
    torch.Generator, torch.tensor, Tensor.pin_memory = Generator, tensor, pin_memory
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(1, device="cuda") then copies to the device
    torch.autograd.set_multithreading_enabled(False)  # else a thread for the device, whose lines are nobody's
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    tensors.RULES.__enter__()
