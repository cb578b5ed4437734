"""Attention under masks: what windows and documents cost or save, in blocks and as a table.

    python -m benchmarks.masks
    python -m benchmarks.masks --batch_size=8 --block_size=8192 --window=1024

The attention of all layers of a network, forward and backward, with the mask made once for all of
them as `Modern` makes it: all earlier positions, a window, documents, or both. `number` is a window
by cuDNN, where nvidia-cudnn-frontend is installed, `blocks` FlexAttention, and `table` PyTorch's
attention with the mask as a tensor. Milliseconds per layer, the median of --repeats after --warmup;
documents begin at random, one in --document tokens. Without a GPU there are only tables.
"""

import argparse
import inspect
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gpt2.distributed.devices import wait_for
from gpt2.distributed.runtime import Runtime
from gpt2.kernels import cudnn_choice
from gpt2.model.attention_masks import Mask, document_ids, mask_for, masked_attention

from .arguments import count, whole

KINDS = {  # name: (window, documents)
    "all earlier": (False, False),
    "window": (True, False),
    "documents": (False, True),
    "window and documents": (True, True),
}


def attention_of(
    options: argparse.Namespace, rt: Runtime, window: bool, documents: bool, way: str
) -> Callable[..., Tensor]:
    """(q, k, v, begins) -> what all layers make of them; the first three (B, H, T, D)."""
    width = torch.tensor(options.window, device=rt.device) if window else None

    def attend(q: Tensor, k: Tensor, v: Tensor, begins: Tensor) -> Tensor:
        mask: Mask = options.window
        if way != "number":
            kept = document_ids(begins) if documents else None
            mask = mask_for(q.shape[2], width, kept, way == "blocks")
        for _ in range(options.n_layer):
            q = masked_attention(q, k, v, mask)
        return q

    return torch.compile(attend) if rt.device.type == "cuda" else attend


def milliseconds(
    attend: Callable[..., Tensor], inputs: list[Tensor], options: argparse.Namespace, rt: Runtime
) -> float:
    """Forward and backward, per layer."""
    *qkv, begins = inputs
    upstream = torch.randn_like(qkv[0])
    taken = []
    for _ in range(options.warmup + options.repeats):
        wait_for(rt.device)
        began = time.perf_counter()
        torch.autograd.grad(attend(*qkv, begins), qkv, upstream)
        wait_for(rt.device)
        taken.append(time.perf_counter() - began)
    return 1e3 * statistics.median(taken[options.warmup :]) / options.n_layer


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """A row for each mask and way."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    rt = Runtime(device, torch.bfloat16 if on_gpu else torch.float32)
    B, H, T, D = options.batch_size, options.n_head, options.block_size, options.head_width
    # in memory as the network has them: (B, T, H, D)
    inputs = torch.randn(3, B, T, H, D, device=device, dtype=rt.dtype).transpose(2, 3)
    inputs = [part.requires_grad_() for part in inputs.unbind()]
    inputs.append(torch.rand(B, T, device=device) < 1 / options.document)
    for name, (window, documents) in KINDS.items():
        ways = ("blocks", "table") if on_gpu else ("table",)
        if window and not documents and cudnn_choice.takes(device, D, on_gpu):
            ways = ("number", *ways)
        for way in ways if window or documents else ("causal",):
            torch.compiler.reset()
            attend = attention_of(options, rt, window, documents, way)
            yield {"mask": name, "way": way, "ms": milliseconds(attend, inputs, options, rt)}


def parser() -> argparse.ArgumentParser:
    """The command line; the sizes are those of configs/speedrun.toml."""
    made = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sizes = {"batch_size": 64, "block_size": 1024, "n_layer": 8, "n_head": 6, "head_width": 128}
    for name, value in (sizes | {"window": 256, "document": 500}).items():
        made.add_argument(f"--{name}", type=count, default=value)
    made.add_argument("--warmup", type=whole, default=3)
    made.add_argument("--repeats", type=count, default=10)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def main():
    """Measures, and prints rows and a table."""
    options = parser().parse_args()
    rows = []
    for row in measure(options):
        print(json.dumps(row), flush=True)
        rows.append(row)
    print("\n| mask | way | ms per layer | of all earlier |\n|---|---|---|---|")
    for row in rows:
        share = row["ms"] / rows[0]["ms"]
        print(f"| {row['mask']} | {row['way']} | {row['ms']:.3f} | {share:.2f} × |")


if __name__ == "__main__":
    main()
