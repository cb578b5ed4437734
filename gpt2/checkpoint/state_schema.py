"""The kinds of values in a training state, checked before anything of it is used.

A state is a nested dict, and its sha256 finds damage but no attacker. `check_kinds` compares the
values with `SCHEMA`. `whole` turns later errors, such as a generator state of the wrong length,
into one line.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, first_line
from ..untrusted.display import shown

Check = Callable[[Any], bool]


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Turns the errors of a block that uses a checkpoint into a UserError that names its file.

    Raises:
        UserError: values that do not fit one another.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(not_whole(path, first_line(e))) from None


def not_whole(path: Path, reason: str) -> str:
    """The message about a checkpoint that cannot be used."""
    return f"{path}: not a whole checkpoint ({shown(reason)})"


def check_kinds(state: Any, path: Path) -> None:
    """Raises UserError for a value of another kind than `SCHEMA` says; keys may be missing."""
    if not isinstance(state, dict):
        raise UserError(not_whole(path, "no table of values"))
    for name, fits in SCHEMA.items():
        if name in state and not fits(state[name]):
            raise UserError(not_whole(path, f"{name} is of another kind than it must be"))


def check_complete(state: dict[str, Any], path: Path) -> None:
    """Raises UserError for a state that lacks a value which every version has written."""
    if missing := [name for name in SCHEMA if name not in state and name not in OPTIONAL]:
        raise UserError(not_whole(path, f"without {missing[0]}"))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | str) or _is_number(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and isfinite(value)


def _is_bytes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 1


def _is_generator(value: Any) -> bool:
    """The state of Python's `random`: (version, 625 words, next normal number or None)."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return False
    version, words, normal = value
    if isinstance(words, Tensor):  # older states have a tuple
        words = words.tolist() if words.shape == (625,) else None
    return (
        _is_count(version)
        and isinstance(words, list | tuple)
        and all(map(_is_count, words))
        and (normal is None or isinstance(normal, float))
    )


def _is_buffer(value: Any) -> bool:
    """Of an optimizer: a tensor, a number, or None in the place of an FSDP part."""
    return value is None or isinstance(value, Tensor) or _is_number(value)


def _table(keys: Check, values: Check) -> Check:
    def fits(value: Any) -> bool:
        return isinstance(value, dict) and all(keys(k) and values(v) for k, v in value.items())

    return fits


def _record(**fields: Check) -> Check:
    def fits(value: Any) -> bool:
        return isinstance(value, dict) and all(
            n in value and f(value[n]) for n, f in fields.items()
        )

    return fits


def _list(of: Check) -> Check:
    return lambda value: isinstance(value, list | tuple) and all(map(of, value))


def _is_shard(value: Any) -> bool:
    """[name, tokens, sha256 of samples]."""
    fits = (_is_text, _is_count, _is_text)
    return (
        isinstance(value, list | tuple)
        and len(value) == len(fits)
        and all(fit(part) for fit, part in zip(fits, value, strict=True))
    )


SCHEMA: dict[str, Check] = {
    "position": _is_count,
    "scaler": _table(_is_text, _is_plain),
    "rng": _list(_record(python=_is_generator, torch=_is_bytes)),
    "tokens_per_step": _is_count,
    "seconds": _is_number,
    "first_steps": _is_number,
    "time_was_up": _is_number,
    "skipped": _is_count,
    "val_loss": lambda value: value is None or _is_number(value),
    "best_val_loss": _is_number,
    "evals_without_gain": _is_count,
    "evaluated_at": _is_whole,
    "data": _record(
        began=_is_count,
        datasets=_list(
            _record(
                name=_is_text,
                share=_is_share,
                before=_is_count,
                consumed=_is_count,
                shards=_list(_is_shard),
            )
        ),
    ),
    "settings": _table(_is_text, _is_plain),
    "tokenizer": lambda value: isinstance(value, dict),  # see `kept_tokenizer`
    "optimizer": _record(
        state=_table(_is_count, _table(_is_text, _is_buffer)),
        param_groups=_list(_record(params=_list(_is_count))),
    ),
}
# Version 0.1.0 may lack all but the tokenizer, which is there where it is not GPT-2's.
OPTIONAL = ("data", "tokenizer", "tokens_per_step", "first_steps", "time_was_up")
