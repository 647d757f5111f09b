"""An emulated CUDA device, to find on the CPU what would fail on a GPU.

Tensors say cuda:0 and hold their values in CPU memory. An operation on them does what it does on the CPU, once CUDA's
rules are checked:

- tensors and generators are of one device, but for numbers in tensors without dimensions (`tensors`);
- where the host has to wait for the device, that is counted (`host`);
- while a graph is captured nothing runs, the host must not wait, and nothing is drawn (`graphs`).

It sees neither operators that CUDA lacks, nor streams, memory and speed. `torch.compile` is left out, and the default
generator is that of the CPU.

`backend.cpp` has to be loaded before torch is imported, and `device.install` replaces parts of torch for good. So every
check runs in a process of its own: `python -m emulated_cuda LIBRARY CHECK CASE ...`.
"""
