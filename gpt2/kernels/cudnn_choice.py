"""Whether cuDNN's attention takes a tensor, which compiled code asks once.

`assume_constant_result` imports the compiler: what every process imports must not import this file.
"""

import torch

from .cudnn_attention import fits, frontend


@torch.compiler.assume_constant_result
def takes(device: torch.device, head_width: int, in_bf16: bool) -> bool:
    """Whether `cudnn_attention` computes attention of heads of so many channels on a GPU."""
    return fits(device, head_width, in_bf16) and frontend() is not None
