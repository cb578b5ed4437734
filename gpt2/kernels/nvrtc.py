"""CUDA C++ that is compiled when it is first needed, by NVRTC, which PyTorch installs.

For what Triton cannot express: threads that do different work, barriers of some of them, copies
that run ahead. The C interfaces are nvrtc.h and cuda.h (NVIDIA, "NVRTC" and "CUDA Driver API").
"""

import ctypes
import functools
import sys
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path

import torch

MAX_DYNAMIC_SHARED_BYTES = 8  # CUfunction_attribute

# Each line is a prototype; all functions return an int, 0 for success.
_POINTER = c_void_p
NVRTC_TYPES = {
    "nvrtcCreateProgram": (_POINTER, c_char_p, c_char_p, c_int, _POINTER, _POINTER),
    "nvrtcCompileProgram": (_POINTER, c_int, _POINTER),
    "nvrtcGetProgramLogSize": (_POINTER, _POINTER),
    "nvrtcGetProgramLog": (_POINTER, _POINTER),
    "nvrtcGetCUBINSize": (_POINTER, _POINTER),
    "nvrtcGetCUBIN": (_POINTER, _POINTER),
}
DRIVER_TYPES = {
    "cuModuleLoadData": (_POINTER, _POINTER),
    "cuModuleGetFunction": (_POINTER, _POINTER, c_char_p),
    "cuFuncSetAttribute": (_POINTER, c_int, c_int),
    "cuLaunchCooperativeKernel": (_POINTER, *[c_uint] * 7, _POINTER, _POINTER),
}


@functools.cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    """NVRTC and the driver, or None where one is missing."""
    major = (torch.version.cuda or "").split(".")[0]
    try:
        nvrtc = ctypes.CDLL(f"libnvrtc.so.{major}")
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    for library, types in ((nvrtc, NVRTC_TYPES), (driver, DRIVER_TYPES)):
        for name, arguments in types.items():
            getattr(library, name).argtypes = arguments
    return nvrtc, driver


def available() -> bool:
    """Whether CUDA C++ can be compiled and launched here."""
    return sys.platform == "linux" and _libraries() is not None


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what}: error {status}")


def compiled(sources: list[Path], constants: dict[str, int], architecture: str) -> bytes:
    """Machine code of some files, one after the other, with constants as macros.

    Raises:
        RuntimeError: the compiler's messages.
    """
    libraries = _libraries()
    assert libraries is not None
    nvrtc, program = libraries[0], c_void_p()
    text = "".join(path.read_text("utf-8") for path in sources).encode()
    _check(
        nvrtc.nvrtcCreateProgram(byref(program), text, sources[-1].name.encode(), 0, None, None),
        "nvrtcCreateProgram",
    )
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in constants.items()]
    words = (c_char_p * len(options))(*[option.encode() for option in options])
    if nvrtc.nvrtcCompileProgram(program, len(options), words):
        log = _bytes(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        raise RuntimeError(log.rstrip(b"\0").decode())
    return _bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)


def _bytes(size_of, content_of, program: c_void_p) -> bytes:
    size = c_size_t()
    _check(size_of(program, byref(size)), "NVRTC")
    content = ctypes.create_string_buffer(size.value)
    _check(content_of(program, content), "NVRTC")
    return content.raw


class Kernel:
    """A kernel on the current device.

    Args:
        code: what `compiled` returns.
        name: of an `extern "C"` function with one argument, a structure.
        shared_bytes: of dynamic shared memory per block.
    """

    def __init__(self, code: bytes, name: str, shared_bytes: int) -> None:
        libraries = _libraries()
        assert libraries is not None
        self.driver, self.shared_bytes = libraries[1], shared_bytes
        torch.cuda.current_stream()  # PyTorch has begun to use the device
        module, self.function = c_void_p(), c_void_p()
        _check(self.driver.cuModuleLoadData(byref(module), code), "cuModuleLoadData")
        found = self.driver.cuModuleGetFunction(byref(self.function), module, name.encode())
        _check(found, "cuModuleGetFunction")
        limit = self.function, MAX_DYNAMIC_SHARED_BYTES, shared_bytes
        _check(self.driver.cuFuncSetAttribute(*limit), "cuFuncSetAttribute")

    def launch_together(self, blocks: int, threads: int, argument: ctypes.Structure) -> None:
        """Launches blocks that all run at the same time, on the current stream.

        Raises:
            RuntimeError: the device has no room for them.
        """
        stream = c_void_p(torch.cuda.current_stream().cuda_stream)
        arguments = (c_void_p * 1)(ctypes.addressof(argument))
        shape = blocks, 1, 1, threads, 1, 1, self.shared_bytes
        status = self.driver.cuLaunchCooperativeKernel(self.function, *shape, stream, arguments)
        _check(status, "cuLaunchCooperativeKernel")
