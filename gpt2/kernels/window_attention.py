"""Causal attention within a window, by cuDNN.

FlexAttention computes two blocks of 128 by 128 scores for a window of 128, and evaluates the mask
for each score. cuDNN's kernels know what a window is, but PyTorch (2.11 to 2.14) has no argument
for it. `nvidia-cudnn-frontend` is NVIDIA's Python interface to the cuDNN that PyTorch installs
(cuDNN documentation, "Frontend API", "Attention").

Shapes: `B` batch, `H` heads, `T` positions, `D` head width.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ..errors import install_command
from .custom_op import custom_op

CAPABILITIES = 9, 10  # compute capabilities on which PyTorch prefers cuDNN's causal attention
OLDEST_CUDNN = 91501  # that it prefers
WIDEST = 128  # D of cuDNN's gradients


@functools.cache
def frontend() -> Any:
    """The module `cudnn`; None where it is not installed, or finds no cuDNN."""
    try:
        import cudnn
    except (ImportError, OSError, RuntimeError):
        return None
    return cudnn


def _fits(device: torch.device, head_width: int, in_bf16: bool) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or not in_bf16:
        return False
    new = (torch.backends.cudnn.version() or 0) >= OLDEST_CUDNN
    known = torch.cuda.get_device_capability(device)[0] in CAPABILITIES
    return new and known and head_width % 8 == 0 and head_width <= WIDEST


@torch.compiler.assume_constant_result
def takes_windows(device: torch.device, head_width: int, in_bf16: bool) -> bool:
    """Whether cuDNN computes windows for heads of so many channels."""
    return _fits(device, head_width, in_bf16) and frontend() is not None


def describe_windows(
    device: torch.device, head_width: int, dtype: torch.dtype, alone: bool = True
) -> str:
    """Which kernel computes attention windows in training, in one sentence.

    Args:
        device: of the run.
        head_width: channels.
        dtype: of queries, keys and values.
        alone: whether windows stay as they are, and no documents limit attention as well.
    """
    fits = alone and _fits(device, head_width, dtype is torch.bfloat16)
    if fits and frontend() is not None:
        return "attention windows: cuDNN"
    hint = f"; cuDNN's are faster: {install_command('cudnn')}" if fits else ""
    return f"attention windows: FlexAttention where it is compiled{hint}"


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """softmax(q kᵀ / √D) v over the last `window` positions, a query's own included.

    Args:
        q: (B, H, T, D); on a GPU in bf16. So k and v.
        k: (B, H, T, D).
        v: (B, H, T, D).
        window: at least 1.
    """
    return _WindowAttention.apply(q, k, v, window)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, window: int):
        y, log_sums = _attention(q, k, v, window)
        ctx.save_for_backward(q, k, v, y, log_sums)
        ctx.window = window
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        return *_attention_gradients(dy, *ctx.saved_tensors, ctx.window), None


def _like_heads(x: Tensor) -> Tensor:
    """(B, H, T, D), uninitialised, in memory (B, T, H, D) as the network wants it."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


@custom_op(name="window_attention")
def _attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of each softmax's sum, (B, H, T, 1) in float32."""
    y, log_sums = _like_heads(q), q.new_empty(*q.shape[:3], 1, dtype=torch.float32)
    if q.is_cuda:
        _launch("forward", window, q, k, v, y, log_sums)
        return y, log_sums
    scores = _scores(q, k, window)
    log_sums.copy_(scores.logsumexp(-1, keepdim=True))
    y.copy_((scores - log_sums).exp() @ v)
    return y, log_sums


@torch.library.register_fake("gpt2::window_attention")
def _attention_fake(q, k, v, window):
    return _like_heads(q), q.new_empty(*q.shape[:3], 1, dtype=torch.float32)


@custom_op(name="window_attention_gradients")
def _attention_gradients(  # noqa: PLR0917
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    gradients = tuple(_like_heads(x) for x in (q, k, v))
    if q.is_cuda:
        dy = dy if dy.stride(-1) == 1 and 0 not in dy.stride() else dy.contiguous()
        _launch("backward", window, dy, q, k, v, y, log_sums, *gradients)
        return gradients
    p = (_scores(q, k, window) - log_sums).exp()
    ds = p * (dy @ v.mT - (dy * y).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    for gradient, value in zip(gradients, (ds @ k, ds.mT @ q, p.mT @ dy), strict=True):
        gradient.copy_(value)
    return gradients


@torch.library.register_fake("gpt2::window_attention_gradients")
def _attention_gradients_fake(dy, *tensors):
    return tuple(_like_heads(x) for x in tensors[:3])


def _scores(q: Tensor, k: Tensor, window: int) -> Tensor:
    """q kᵀ / √D, -inf where a query does not see a key; the plain form."""
    at = torch.arange(q.shape[2], device=q.device)
    distance = at[:, None] - at
    hidden = (distance < 0) | (distance >= window)
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)


class _Plan:
    """Kernels that cuDNN chose for tensors of some shapes and strides.

    Args:
        graph: built.
        places: the graph's names of the tensors.
        device: of them.
    """

    def __init__(self, graph: Any, places: list[Any], device: torch.device) -> None:
        self.graph, self.device = graph, device
        self.uids = [place.get_uid() for place in places]
        self.workspace_bytes = graph.get_workspace_size()

    def __call__(self, *tensors: Tensor) -> None:
        """Launches the kernels on the current stream; a CUDA graph may record them."""
        handle = _handle(self.device)
        frontend().set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=self.device)
        self.graph.execute(dict(zip(self.uids, tensors, strict=True)), workspace, handle=handle)


@functools.cache
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return frontend().create_handle()


_PLANS: dict[tuple, _Plan] = {}


def _launch(way: str, window: int, *tensors: Tensor) -> None:
    """Computes the last tensors from the first, by the plan for such tensors."""
    tensors = tuple(t.detach() for t in tensors)  # DLPack takes none that requires gradients
    device = tensors[0].device
    key = way, window, device, *((t.shape, t.stride()) for t in tensors)
    if key not in _PLANS:
        build = _build_forward if way == "forward" else _build_backward
        _PLANS[key] = _Plan(*build(window, *tensors), device)
    _PLANS[key](*tensors)


def _graph_and_options(window: int, q: Tensor) -> tuple[Any, dict[str, Any]]:
    cudnn = frontend()
    types = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=types.BFLOAT16,
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
        handle=_handle(q.device),
    )
    options = {
        "attn_scale": q.shape[-1] ** -0.5,
        "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
        "diagonal_band_left_bound": window,
        "diagonal_band_right_bound": 0,
    }
    return graph, options


def _build(graph: Any, outputs: list[tuple[Any, Tensor]]) -> None:
    cudnn = frontend()
    for place, tensor in outputs:
        place.set_output(True).set_dim(list(tensor.shape)).set_stride(list(tensor.stride()))
        if tensor.dtype == torch.float32:
            place.set_data_type(cudnn.data_type.FLOAT)
    graph.build([cudnn.heur_mode.A])


def _build_forward(window: int, *tensors: Tensor) -> tuple[Any, list[Any]]:
    q, k, v, y, log_sums = tensors
    graph, options = _graph_and_options(window, q)
    inputs = [graph.tensor_like(tensor) for tensor in (q, k, v)]
    outputs = graph.sdpa(*inputs, generate_stats=True, **options)
    _build(graph, list(zip(outputs, (y, log_sums), strict=True)))
    return graph, [*inputs, *outputs]


def _build_backward(window: int, *tensors: Tensor) -> tuple[Any, list[Any]]:
    graph, options = _graph_and_options(window, tensors[1])
    dy, q, k, v, y, log_sums = inputs = [graph.tensor_like(tensor) for tensor in tensors[:6]]
    outputs = graph.sdpa_backward(q, k, v, y, dy, log_sums, **options)
    _build(graph, list(zip(outputs, tensors[6:], strict=True)))
    return graph, [*inputs, *outputs]
