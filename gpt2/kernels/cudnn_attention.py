"""Causal attention by cuDNN with what PyTorch has no argument for; the plain form on a CPU.

PyTorch (2.11 to 2.15) calls the cuDNN that it installs, but can neither ask for a window nor say
where in memory gradients go. `nvidia-cudnn-frontend`, NVIDIA's Python interface to the library, can
(cuDNN documentation, "Frontend API", "Attention").

Shapes: `B` batch, `H` heads, `T` positions, `D` head width.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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


def fits(device: torch.device, head_width: int, in_bf16: bool) -> bool:
    """Whether cuDNN is fast for heads of so many channels, if the frontend is there."""
    if device.type != "cuda" or torch.version.hip is not None or not in_bf16:
        return False
    new = (torch.backends.cudnn.version() or 0) >= OLDEST_CUDNN
    known = torch.cuda.get_device_capability(device)[0] in CAPABILITIES
    return new and known and head_width % 8 == 0 and head_width <= WIDEST


def forward(  # noqa: PLR0917 - what attention has
    window: int, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: Tensor
) -> None:
    """Writes causal attention, and the logarithm of each softmax's sum.

    Args:
        window: last positions that a query sees, its own included; 0: all.
        q: (B, H, T, D); on a GPU in bf16, by any strides but the last. So k, v and y.
        k: (B, H, T, D).
        v: (B, H, T, D).
        y: (B, H, T, D), written.
        log_sums: (B, H, T, 1) in float32, written.
    """
    if q.is_cuda:
        _launch("forward", window, q, k, v, y, log_sums)
        return
    scores = _scores(q, k, window)
    log_sums.copy_(scores.logsumexp(-1, keepdim=True))
    y.copy_((scores - log_sums).exp() @ v.to(scores.dtype))


def backward(window: int, dy: Tensor, saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Writes the gradients of q, k and v.

    Args:
        window: as of `forward`.
        dy: (B, H, T, D), the gradient of y.
        saved: q, k, v, y and log_sums, as `forward` had them.
        gradients: three of (B, H, T, D), written.
    """
    q, k, v, y, log_sums = saved
    if q.is_cuda:
        dy = dy if dy.stride(-1) == 1 and 0 not in dy.stride() else dy.contiguous()
        _launch("backward", window, dy, *saved, *gradients)
        return
    p = (_scores(q, k, window) - log_sums).exp()
    dy, q, k, v, y = (t.to(p.dtype) for t in (dy, q, k, v, y))
    ds = p * (dy @ v.mT - (dy * y).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    for gradient, value in zip(gradients, (ds @ k, ds.mT @ q, p.mT @ dy), strict=True):
        gradient.copy_(value)


def _scores(q: Tensor, k: Tensor, window: int) -> Tensor:
    """q kᵀ / √D in float32 or wider, -inf where a query does not see a key; the plain form."""
    q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k))
    at = torch.arange(q.shape[2], device=q.device)
    distance = at[:, None] - at
    hidden = (distance < 0) | (distance >= (window or len(at)))
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
        "diagonal_band_right_bound": 0,
    }
    return graph, options | ({"diagonal_band_left_bound": window} if window else {})


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
