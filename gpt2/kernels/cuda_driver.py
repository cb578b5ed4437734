"""The NVIDIA driver, asked by ctypes: PyTorch 2.11 does not tell its version."""

import ctypes
import sys


def driver_version() -> int:
    """The newest CUDA that the driver runs: 12030 for 12.3; 0 where there is no such driver."""
    version = ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value
