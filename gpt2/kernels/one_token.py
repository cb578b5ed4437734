"""A token of one sequence in one kernel, `one_token.cu`.

`generate.few_token_pass.next_logits` is the plain form.

Shapes: `C` channels, `H` heads, `D` = C / H, `V` vocabulary.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import nvrtc

SOURCES = [Path(__file__).with_name(name) for name in ("ptx.cu", "one_token.cu")]
HOPPER = 9  # compute capability with copies that run ahead; no later GPU was tried
WIDEST, LONGEST = 1600, 1024  # channels and positions that were tried
HEAD_WIDTHS = 32, 64, 128  # D
WARPS = 12  # of a block that compute, at most
SHARES = 4  # blocks that attend for a head
SHARED_BYTES = 227 << 10  # of a block on Hopper
POINTERS = (
    *("layers", "wte", "wpe", "gain", "shift", "token", "length", "told", "logits"),
    *("x", "qkv", "hidden", "best", "mixed", "passes"),
)


class Network(ctypes.Structure):
    """The argument of the kernel, as one_token.cu declares it."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in POINTERS],
        *[(name, ctypes.c_int) for name in ("vocabulary", "capacity", "chooses")],
        ("eps", ctypes.c_float),
    )


def fits(model: Any, rows: int) -> bool:
    """Whether the kernel is made for a network of GPT-2, its precision, its GPU and so many rows.

    Args:
        model: one that `few_token_pass.supports` accepts.
        rows: sequences.
    """
    weight, config = model.transformer.wte.weight, model.config
    if rows > 1 or not weight.is_cuda or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.version.hip is not None or not nvrtc.available():
        return False
    gpu = torch.cuda.get_device_properties(weight.device)
    macros = constants(config, gpu.multi_processor_count)
    return (
        gpu.major == HOPPER
        and pieces_of_a_phase(macros) <= macros["STAGES"]
        and gpu.multi_processor_count <= config.n_embd <= WIDEST
        and config.n_embd % 64 == 0
        and config.block_size <= LONGEST
        and config.n_embd // config.n_head in HEAD_WIDTHS
        and config.n_head * SHARES <= gpu.multi_processor_count
        and all(tensor.data_ptr() % 16 == 0 for tensor in model.parameters())
    )


def constants(config: Any, blocks: int) -> dict[str, int]:
    """The macros of one_token.cu for a network."""
    C = config.n_embd
    # A piece of weights has one to three rows of the widest matrix. A block keeps those of a phase
    # until its end, so the ring needs room for all of them.
    stage = 8 * C * (3 if C <= 768 else 2 if C <= 1024 else 1)
    warps = max(w for w in range(1, WARPS + 1) if C % (64 * w) == 0)
    windows, tiles = C // (32 * warps), -(4 * C // -(8 * blocks))
    words = 2 * 16 * (4 * windows | 1) + 6 * 8 * (tiles | 1) + 160  # of a warp
    others = 4 * (warps * words + C) + 112 * config.n_layer + 2048  # bytes, or a few less
    return {
        "C": C,
        "HEADS": config.n_head,
        "LAYERS": config.n_layer,
        "LONGEST": config.block_size,
        "BLOCKS": blocks,
        "THREADS": 32 * warps,
        "STAGE": stage,
        "STAGES": min(32, (SHARED_BYTES - others) // stage),  # a warp waits for all at once
    }


def pieces_of_a_phase(macros: dict[str, int]) -> int:
    """The most pieces of weights that a block needs at a time."""
    C, most = macros["C"], 0
    for outputs, width in ((3 * C, C), (4 * C, C), (C, 4 * C)):
        rows, of_piece = -(outputs // -macros["BLOCKS"]), macros["STAGE"] // (2 * width)
        most = max(most, -(rows // -of_piece))
    return most


@functools.cache
def _kernel(device: torch.device, macros: tuple[tuple[str, int], ...]) -> nvrtc.Kernel:
    code = nvrtc.compiled(SOURCES, dict(macros), f"sm_{HOPPER}0a")
    return nvrtc.Kernel(code, "one_token", SHARED_BYTES)


class OneToken:
    """Appends a token to a cache of one row and computes the logits after it.

    Args:
        model: one that `fits`.
        cache: a `KVCache` of one row with `lengths`.
        blocks: of the kernel, all of which run at the same time; None: as many as the GPU has
            multiprocessors.
        launch: called with a `Network` in place of the kernel.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        *,
        blocks: int | None = None,
        launch: Callable[[Network], None] | None = None,
    ) -> None:
        assert cache.lengths is not None
        assert cache.keys.is_contiguous()
        assert cache.values.is_contiguous()
        self.model, self.cache = model, cache
        parts, config, wte = model.transformer, model.config, model.transformer.wte.weight
        if blocks is None:
            blocks = torch.cuda.get_device_properties(wte.device).multi_processor_count
        C = config.n_embd
        words = {"x": C, "qkv": 3 * C, "mixed": SHARES * C, "hidden": 4 * C}
        words["best"] = 2 * blocks
        cached = zip(parts.h, cache.keys, cache.values, strict=True)
        # the kernel has addresses alone, so the tensors are kept
        self.layers = [_tensors(block, keys, values) for block, keys, values in cached]
        rows = [[tensor.data_ptr() for tensor in tensors] for tensors in self.layers]
        self.logits = wte.new_empty(1, len(wte))  # (1, V)
        # (S,) the token chosen at each position, which the GPU writes to memory of the CPU
        self.told = torch.zeros(cache.keys.shape[3], dtype=torch.int64, pin_memory=wte.is_cuda)
        self.tensors = {
            "layers": torch.tensor(rows).to(wte.device),
            **{"wte": wte, "wpe": parts.wpe.weight},
            **{"gain": parts.ln_f.weight, "shift": parts.ln_f.bias},
            **{"length": cache.lengths, "told": self.told, "logits": self.logits},
            **{n: wte.new_zeros(size, dtype=torch.int64) for n, size in words.items()},
            "passes": wte.new_zeros(1, dtype=torch.int32),
        }
        addresses = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        sizes = {"vocabulary": len(wte), "capacity": cache.keys.shape[3], "eps": parts.ln_f.eps}
        self.network = Network(**addresses, **sizes)
        self.launch = launch or self._launch
        macros = constants(config, blocks) | ({"FLOAT16": 1} if wte.dtype == torch.float16 else {})
        if launch is None:
            self.kernel, self.blocks = _kernel(wte.device, tuple(macros.items())), blocks
            self.threads = macros["THREADS"] + 32

    def next_logits(self, token: Tensor, *, choose: bool = False) -> Tensor:
        """Appends a token; the logits that follow.

        Args:
            token: (1,) int64.
            choose: write the likeliest next token to `token`, and to `told` at its position.

        Returns:
            (1, V) logits, overwritten by the next call.
        """
        self.network.token, self.network.chooses = token.data_ptr(), choose
        self.launch(self.network)
        self.cache.length += 1  # the kernel has advanced `lengths`
        return self.logits

    def _launch(self, network: Network) -> None:
        self.kernel.launch_together(self.blocks, self.threads, network)


def _tensors(block: Any, keys: Tensor, values: Tensor) -> list[Tensor]:
    """Those of a `Layer` of one_token.cu."""
    attn, mlp = block.attn, block.mlp
    layers = block.ln_1, attn.c_attn, attn.c_proj, block.ln_2, mlp.c_fc, mlp.c_proj
    return [*[t for layer in layers for t in (layer.weight, layer.bias)], keys, values]
