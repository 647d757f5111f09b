"""`python -m emulated_cuda LIBRARY CHECK CASE ...`: a function of `checks`, and a line of JSON with what it finds."""

import ctypes
import json
import sys

if __name__ == "__main__":
    _, library, check, *cases = sys.argv
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # before torch is imported, which then finds this CUDA

    from emulated_cuda import checks, device

    device.install()
    print(json.dumps({case: getattr(checks, check)(case) for case in cases}))
