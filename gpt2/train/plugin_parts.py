"""Parts of a plugin, tried on random tokens before the first step.

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

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
ROWS = 2  # of the input, each as long as the context: a part may need it whole
NOISE = 0.02  # that parameters of 0 get: they would hide what a part does
SAME, SIMILAR = 1e-4, 0.02  # difference / largest number: of equal and of differently cut matmuls


def check_parts(model: Any, rt: Runtime) -> None:
    """Tries each part of a plugin: shape, later tokens, constants, gradients, random numbers.

    Random numbers go on as if nothing had been drawn. Sets `model.parts_draw`.

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
    # A dropout that the trial does not reach may be reached later.
    draws = [m.p > 0 for m in model.transformer.h.modules() if isinstance(m, DROPOUT)]
    try:
        # Compiling a part for this one input would take longer than the check.
        with torch.compiler.set_stance("force_eager"), rt.autocast():
            for kind in ("norm", "mlp"):  # an MLP reads what the norm gives
                if registered(kind, settings[kind]):
                    draws.append(_check_part(kind, settings[kind], model.config, rt))
    finally:
        set_rng_state(kept, rt.device)
    model.parts_draw = any(draws)


def _check_part(kind: str, name: str, config: Any, rt: Runtime) -> bool:
    """Tries one part, and says whether it draws random numbers in training."""
    label = f"{kind}={name}"
    with blamed(kind, name):
        part = _make(kind, name, config, rt, noise=NOISE)
        x = _input(kind, part, config, rt)
        if not _is_finite(part, x):  # by the noise, perhaps: a logarithm has a domain
            part = _make(kind, name, config, rt)
    with blamed(kind, name, f"tried on an input of {tuple(x.shape)}: "):
        if isinstance(part, nn.Module) and rt.sharded:
            _check_for_fsdp(label, part)
        with torch.no_grad():
            if kind == "norm":
                _check_input(label, part, x)
            draws = _draws(label, part, x, rt)
            _check_tokens(label, part, x, in_training=not draws)
            if isinstance(part, nn.Module):
                _check_constants(label, part, _make(kind, name, config, rt, number=1), x)
            if rt.is_main:
                _check_cache(label, part, x)
        if isinstance(part, nn.Module):
            _check_gradients(label, part.train(), x, rt)
    return draws


def _make(
    kind: str, name: str, config: Any, rt: Runtime, *, number: int = 0, noise: float = 0.0
) -> Any:
    """The part, a module on the device of the run; what it draws follows from the number."""
    seed(number)
    part = build_own(kind, name, config)
    if isinstance(part, nn.Module):
        part.to(rt.device)
        with torch.no_grad():
            for p in part.parameters():
                if p.requires_grad and noise:
                    p.add_(noise * torch.randn_like(p) * (p == 0))
    return part


@torch.no_grad()
def _is_finite(part: Any, x: Tensor) -> bool:
    """Whether a part gives finite numbers; what else it may give is for `_output`."""
    try:
        y = part(x.clone())
    except Exception:  # noqa: BLE001 - other people's code raises anything
        return False
    return not isinstance(y, Tensor) or bool(y.isfinite().all())


def _input(kind: str, part: Any, config: Any, rt: Runtime) -> Tensor:
    """(B, T, C) for a norm or an MLP, (B, T, 4 C) for an activation; its dtype is a run's."""
    from ..model.modern import Norm  # a run of GPT-2 never imports it

    C = config.n_embd
    x = to_residual_stream(torch.randn(ROWS, config.block_size, C, device=rt.device))
    if kind == "mlp":
        x = Norm(config).to(rt.device)(x)
    if kind == "mlp" and not isinstance(part, nn.Module):
        x = F.linear(x, torch.randn(4 * C, C, device=rt.device) * C**-0.5)
    return x.detach()


def _output(label: str, part: Callable, x: Tensor, *, finite: bool = True) -> Tensor:
    """What a part gives for x, numbers of its shape; with the same draws at each call."""
    seed(0)
    y = part(x.clone())  # an MLP or an activation may write into it
    if not (isinstance(y, Tensor) and y.is_floating_point() and y.shape == x.shape):
        found = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise UserError(
            f"{label} gives {found} for an input of {tuple(x.shape)}; it must give floating "
            "numbers of the input's shape"
        )
    feeds_matmul = label.startswith("norm=") or not isinstance(part, nn.Module)
    casts = torch.is_autocast_enabled(x.device.type)
    too_wide = y.dtype == torch.float64 != x.dtype  # would make the residual stream float64
    if too_wide or (feeds_matmul and y.dtype != x.dtype and not casts):
        raise UserError(
            f"{label} gives {str(y.dtype)[6:]} for an input of {str(x.dtype)[6:]}; end it with "
            ".to(x.dtype)"
        )
    if finite and not y.isfinite().all():
        raise UserError(f"{label} gives NaN or infinity for random input; it must be finite")
    return y


def _check_input(label: str, part: Callable, x: Tensor) -> None:
    """Raises UserError for a norm that writes into the residual stream."""
    for training in (False, True):
        if isinstance(part, nn.Module):
            part.train(training)
        given = x.clone()
        part(given)
        if not torch.equal(given, x):
            raise UserError(
                f"{label} writes into its input, which is the residual stream; give a new tensor"
            )


def _close(a: Tensor, b: Tensor, share: float = SAME) -> bool:
    """Whether two tensors are equal but for rounding."""
    share = max(share, 4 * torch.finfo(a.dtype).eps)
    return bool((a - b).abs().max() <= share * a.abs().max())


def _check_for_fsdp(label: str, part: nn.Module) -> None:
    """Raises UserError for parameters that FSDP cannot take.

    It cuts each parameter by its first dimension, and gathers a block's in one type.
    """
    for name, p in part.named_parameters():
        if not p.ndim:
            raise UserError(
                f"{label}: --parallel=fsdp cannot cut its parameter {name}, a single number; give "
                "it the shape (1,), or use --parallel=ddp"
            )
        if p.dtype != torch.float32:
            raise UserError(
                f"{label}: --parallel=fsdp cannot take its parameter {name}, which is "
                f"{str(p.dtype)[6:]}; make it float32, or use --parallel=ddp"
            )


def _check_gradients(label: str, part: nn.Module, x: Tensor, rt: Runtime) -> None:
    """Raises UserError for a parameter without a gradient, for which several ranks would wait.

    One rank leaves it as it is, and is warned.
    """
    trained = {name: p for name, p in part.named_parameters() if p.requires_grad}
    y = _output(label, part, x.clone().requires_grad_())
    gradients: tuple[Tensor | None, ...] = (None,) * len(trained)
    if trained and y.requires_grad:
        ones = torch.ones_like(y)
        gradients = torch.autograd.grad(y, [*trained.values()], ones, allow_unused=True)
    missing = [name for name, g in zip(trained, gradients, strict=True) if g is None]
    if not missing:
        return
    name = missing[0]
    said = (
        f"{label}: no gradient reaches its parameter {name}, for which several ranks wait; use it "
        f"in forward, freeze it by requires_grad=False, or add 0 * {name}.sum() to the output"
    )
    if rt.world_size > 1:
        raise UserError(said)
    console.warn(said)


def _draws(label: str, part: Any, x: Tensor, rt: Runtime) -> bool:
    """Whether a fresh part draws random numbers; True where a device does not show it."""
    states = []
    for forward in (False, True):
        seed(0)
        if forward:
            _output(label, part, x)
        state = rng_state(rt.device)
        states.append([state.pop("python")[1], *state.values()])
    changed = any(not torch.equal(a, b) for a, b in zip(*states, strict=True))
    return changed or rt.device.type not in ("cpu", "cuda")


def _check_tokens(label: str, part: Any, x: Tensor, *, in_training: bool) -> None:
    """Raises UserError if an output changes with later tokens, or with those of another row.

    In training and in evaluation: a batch norm differs. A part that draws in training is judged in
    evaluation alone: where an expert gets one token more, all others get another dropout.
    """
    cut = min(x.shape[1] // 2 | 1, x.shape[1] - 1)  # odd: inside a chunk of tokens
    changed = x.clone()
    changed[-1, cut:] = 2 * x[-1, cut:].abs()  # another mean and another length: no sum hides it
    before = x.shape[1] * (ROWS - 1) + cut  # tokens that are as they were
    for training in (True, False) if in_training else (False,):
        if isinstance(part, nn.Module):
            part.train(training)
        first, again = _output(label, part, x), _output(label, part, x)
        other = _output(label, part, changed, finite=False)  # no input of a run
        same = _close(first.flatten(0, 1)[:before], other.flatten(0, 1)[:before])
        # Where it is not equal again, the part draws by a generator of its own.
        if not same and torch.equal(first, again) and other.isfinite().all():
            raise UserError(
                f"{label} reads later tokens or other sequences, so its losses would be false; "
                "compute each token from itself and those before it"
            )


def _check_cache(label: str, part: Any, x: Tensor) -> None:
    """Warns of a part that gives a token by itself, as the KV cache does, another output."""
    whole = _output(label, part, x)[:, -1:]
    try:
        alone = _output(label, part, x[:, -1:])
    except Exception:  # noqa: BLE001 - a part in chunks raises anything, and still trains
        found = "fails on a single token, as the KV cache gives them"
    else:
        found = "reads tokens before its own, which the KV cache does not keep"
        if _close(whole, alone, SIMILAR):
            return
    console.warn(
        f"{label} {found}: texts are right only in Python, by generate(…, use_cache=False)"
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
