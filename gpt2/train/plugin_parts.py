"""Parts of a plugin, tried on a few random tokens before the first step.

A wrong part often trains without a word: a shape that broadcasts, a look at later tokens, a number
that no checkpoint keeps. The parts are made anew for this, beside the network, which stays as it
is: under FSDP a rank has only pieces of the network's own.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.registry import blamed, has_own_parts, registered
from ..distributed.random_state import rng_state, seed, set_rng_state
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..kernels.precision import to_residual_stream
from ..model.own_parts import build_own
from ..report import console
from ..untrusted.display import shown

ROWS, TOKENS = 2, 8  # of the input
NOISE = 0.02  # that parameters get: weights of 0 would hide what a part does
SAME, SIMILAR = 1e-4, 0.02  # difference / largest number: of equal and of differently cut matmuls


def check_parts(model: Any, rt: Runtime) -> None:
    """Tries each part of a plugin: shape, later tokens, constants, gradients.

    Random numbers go on as if nothing had been drawn.

    Args:
        model: the network, a `LanguageModel`.
        rt: this process; no rank waits for another.

    Raises:
        UserError: a part that breaks its contract, or whose code fails.
    """
    settings = model.config.switches()
    if not has_own_parts(settings):
        return
    kept = rng_state(rt.device)
    try:
        # Compiling a part for this small input would take longer than the check.
        with torch.compiler.set_stance("force_eager"), rt.autocast():
            for kind in ("norm", "mlp"):  # an MLP reads what the norm gives
                if registered(kind, settings[kind]):
                    with blamed(kind, settings[kind]):
                        _check_part(kind, settings[kind], model.config, rt)
    finally:
        set_rng_state(kept, rt.device)


def _check_part(kind: str, name: str, config: Any, rt: Runtime) -> None:
    label, part = f"{kind}={name}", _make(kind, name, config, rt, number=0)
    x = _input(kind, part, config, rt)
    if isinstance(part, nn.Module):
        _check_parameters(label, part, x, rt)
    with torch.no_grad():
        _check_tokens(label, part, x)
        if isinstance(part, nn.Module):
            _check_constants(label, part, _make(kind, name, config, rt, number=1), x)
        alone = _output(label, part, x[:, -1:])
        if rt.is_main and not _close(_output(label, part, x)[:, -1:], alone, SIMILAR):
            console.warn(
                f"{label} reads tokens before its own, which the KV cache does not keep: texts are "
                "right only in Python, by generate(…, use_cache=False)"
            )


def _make(kind: str, name: str, config: Any, rt: Runtime, number: int) -> Any:
    """The part, a module on the device of the run; what it draws follows from the number."""
    seed(number)
    part = build_own(kind, name, config)
    if isinstance(part, nn.Module):
        part.to(rt.device)
        with torch.no_grad():
            for p in part.parameters():
                if p.requires_grad:
                    p.add_(NOISE * torch.randn_like(p))
    return part


def _input(kind: str, part: Any, config: Any, rt: Runtime) -> Tensor:
    """(B, T, C) for a norm or an MLP, (B, T, 4 C) for an activation; its dtype is a run's."""
    from ..model.modern import Norm  # a run of GPT-2 never imports it

    C, tokens = config.n_embd, min(TOKENS, config.block_size)
    x = to_residual_stream(torch.randn(ROWS, tokens, C, device=rt.device))
    if kind == "mlp":
        x = Norm(config).to(rt.device)(x)
    if kind == "mlp" and not isinstance(part, nn.Module):
        x = F.linear(x, torch.randn(4 * C, C, device=rt.device) * C**-0.5)
    return x.detach()


def _output(label: str, part: Callable, x: Tensor) -> Tensor:
    """What a part gives for x, finite numbers of its shape; with the same draws at each call."""
    seed(0)
    y = part(x.clone())  # an activation may write into it
    if not (isinstance(y, Tensor) and y.is_floating_point() and y.shape == x.shape):
        found = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise UserError(
            f"{label} gives {found} for an input of {tuple(x.shape)}; it must give floating "
            "numbers of the input's shape"
        )
    if not y.isfinite().all():
        raise UserError(f"{label} gives NaN or infinity for random input; it must be finite")
    return y


def _close(a: Tensor, b: Tensor, share: float = SAME) -> bool:
    """Whether two tensors are equal but for rounding."""
    share = max(share, 4 * torch.finfo(a.dtype).eps)
    return bool((a - b).abs().max() <= share * a.abs().max())


def _check_parameters(label: str, part: nn.Module, x: Tensor, rt: Runtime) -> None:
    """Raises UserError for parameters that DDP or FSDP cannot train.

    DDP waits for the gradient of each parameter, and FSDP cuts each by its first dimension.
    """
    trained = {name: p for name, p in part.named_parameters() if p.requires_grad}
    y = _output(label, part, x.clone().requires_grad_())
    gradients: tuple[Tensor | None, ...] = (None,) * len(trained)
    if trained and y.requires_grad:
        ones = torch.ones_like(y)
        gradients = torch.autograd.grad(y, [*trained.values()], ones, allow_unused=True)
    for (name, p), gradient in zip(trained.items(), gradients, strict=True):
        if gradient is None:
            raise UserError(
                f"{label}: no gradient reaches its parameter {name}; use it in forward, freeze it "
                f"by requires_grad=False, or add 0 * {name}.sum() to the output"
            )
        if rt.sharded and not p.ndim:
            raise UserError(
                f"{label}: --parallel=fsdp cannot cut its parameter {name}, a single number; give "
                "it the shape (1,), or use --parallel=ddp"
            )


def _check_tokens(label: str, part: Any, x: Tensor) -> None:
    """Raises UserError if another output than the last changes with the last token of the last row.

    In training and in evaluation: a batch norm differs. A part that draws by generators of its own
    cannot be judged.
    """
    changed = x.clone()
    changed[-1, -1] = -x[-1, 0]
    for training in (True, False):
        if isinstance(part, nn.Module):
            part.train(training)
        first, again, other = (_output(label, part, value) for value in (x, x, changed))
        same = _close(first.flatten(0, 1)[:-1], other.flatten(0, 1)[:-1])
        if _close(first, again) and not same:
            raise UserError(
                f"{label} reads later tokens or other sequences, so its losses would be false; "
                "compute each token from itself and those before it"
            )


def _check_constants(label: str, part: nn.Module, other: nn.Module, x: Tensor) -> None:
    """Raises UserError if another module with the same parameters gives other outputs."""
    _output(label, part.train(), x)  # what forward changes
    part.eval()
    other.eval()
    for p, own in zip(other.parameters(), part.parameters(), strict=True):
        p.copy_(own)
    if _close(_output(label, part, x), _output(label, other, x)):
        return
    buffers = dict(other.named_buffers())
    odd = [name for name, b in part.named_buffers() if not torch.equal(b, buffers[name])]
    raise UserError(
        f"{label}: made again with the same parameters it gives other outputs"
        f"{f' ({shown(odd[0])} differs)' if odd else ''}, so its checkpoints could not be used; "
        "draw constants by a torch.Generator with a seed, and keep what changes in parameters"
    )
