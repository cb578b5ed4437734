"""Parts that a user's file adds: activations, MLPs, norms, schedules, optimizers, losses.

A plugin is a file of Python that calls `gpt2.register`. It runs when its name stands on the command
line (`--plugin=my_idea.py`) or when a program imports it, never because a checkpoint or a TOML file
names it: a plugin is code. No torch here.
"""

import hashlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError, first_line
from ..untrusted.display import shown
from ..untrusted.parsing import read_bytes

Part = TypeVar("Part", bound=Callable)
# The project's own parts by kind; a kind is also the option whose values a registered name joins.
BUILT_IN: dict[str, tuple[str, ...]] = {
    "mlp": ("gelu", "relu2", "swiglu"),
    "norm": ("layernorm", "rmsnorm"),
    "schedule": ("cosine", "wsd"),
    "optimizer": ("adamw", "muon", "normuon"),
    "loss": (
        "cross_entropy",
        "sampled_softmax",
        "cross_entropy+second",
        "sampled_softmax+second",
    ),
}
OF_THE_NETWORK = ("mlp", "norm")  # kinds without which the weights mean nothing
NAME = re.compile(r"[a-z]\w*")
DIGITS = 16  # of a sha256, in messages

_parts: dict[str, dict[str, Any]] = {kind: {} for kind in BUILT_IN}
_loaded: dict[str, str] = {}  # path of a plugin, as it was given -> sha256


def register(kind: str, name: str) -> Callable[[Part], Part]:
    """A decorator that makes a function or class a value of the option of this kind.

    Args:
        kind: "mlp": a function of a tensor, the activation between two linear layers, or a class
            `cls(config)` of modules (B, T, C) -> (B, T, C). "norm": a function (…, C) -> (…, C), or
            a class of such modules. "schedule": (step, options) -> share of the peak learning rate.
            "optimizer": (parameter groups, options) -> torch.optim.Optimizer. "loss": (logits
            (N, V), targets (N,)) -> losses (N,), of training alone.
        name: value of the option, as in `--mlp=name`.

    Raises:
        UserError: no such kind, a name that is taken, or a part that cannot be called.
    """
    if kind not in BUILT_IN:
        raise UserError(f"gpt2.register({kind!r}, …): use one of {', '.join(BUILT_IN)}")
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in BUILT_IN[kind]:
        raise UserError(
            f"gpt2.register({kind!r}, {shown(str(name))!r}): use another name, of small letters, "
            f"digits and _; {', '.join(BUILT_IN[kind])} are there already"
        )

    def add(part: Part) -> Part:
        if not callable(part):
            raise UserError(
                f"gpt2.register({kind!r}, {name!r}) got {shown(repr(part))}; give it a function or "
                "a class"
            )
        _parts[kind][name] = part
        return part

    return add


def registered(kind: str, name: str) -> Any:
    """The function or class of that name; None for what the project has itself."""
    return _parts[kind].get(name)


def share_of_peak(value: Any, step: int, name: str) -> float:
    """What a registered schedule gives at a step, as a number.

    Raises:
        UserError: it is none, or no learning rate can be multiplied by it.
    """
    try:
        share = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        share = math.nan
    if 0 <= share < math.inf:
        return share
    raise UserError(
        f"schedule={name} gives {shown(value)} at step {step}; it must give a share of the peak "
        "learning rate, a finite number of 0 or more"
    )


def with_registered(kind: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """The choices of an option, and behind them the names that plugins registered for it."""
    return (*choices, *_parts.get(kind, ()))


def has_own_parts(settings: Mapping[str, Any]) -> bool:
    """Whether a network with these switches has parts of a plugin."""
    return any(registered(kind, settings[kind]) for kind in OF_THE_NETWORK)


def make_part(kind: str, name: str, config: Any) -> Any:
    """What a registered class makes for a network; a function as it is; None for ours."""
    part = registered(kind, name)
    if not isinstance(part, type):
        return part
    with blamed(kind, name):
        return part(config)


def own_shapes(kind: str, name: str, config: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the parameters of a registered module by name; None for a function, or for ours."""
    part = registered(kind, name)
    if not isinstance(part, type):
        return {} if part and kind == "norm" else None
    made = make_part(kind, name, config)
    with blamed(kind, name):
        return {n: tuple(p.shape) for n, p in made.named_parameters()}


@contextmanager
def blamed(kind: str, name: str, doing: str = "") -> Iterator[None]:
    """Makes one line of an error in the code of a registered part: its option, file and line.

    Args:
        kind: of the part.
        name: of the part.
        doing: what was done with it, with a colon and a space behind.

    Raises:
        UserError: for an error of any kind.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # other people's code raises anything
        lines = {path: _line_in(error, path) for path in _loaded}
        at = next((f"{path}, {line}" for path, line in lines.items() if line), "")
        raise UserError(f"{kind}={name}: {doing}{at}{_in_words(error)}") from error


def plugins() -> dict[str, str]:
    """The plugins that were loaded: path, as it was given -> sha256."""
    return dict(_loaded)


def check_loaded(text: str) -> None:
    """Raises UserError for plugins of an option that were not loaded."""
    for path in filter(None, text.split(",")):
        if path not in _loaded:
            raise UserError(
                f"plugin={shown(path)} is not loaded; call gpt2.load_plugin({shown(path)!r}) before"
            )


def load_plugin(path: str | Path) -> None:
    """Runs a plugin, once; again if the file has changed.

    Raises:
        UserError: no such file, or code that fails, with its line.
    """
    name = str(path)
    if Path(path).suffix != ".py":
        raise UserError(f"--plugin={name}: name a file of Python, such as my_idea.py")
    digest = hashlib.sha256(read_bytes(Path(path), asked_by=f"--plugin={name}")).hexdigest()
    if _loaded.get(name) == digest:
        return
    module_name = f"gpt2_plugin_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # for pickle and dataclasses
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - other people's code raises anything
        raise UserError(f"--plugin={name}: {_line_in(error, name)}{_in_words(error)}") from None
    _loaded[name] = digest


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _line_in(error: BaseException, name: str) -> str:
    """ "line 3: " of the plugin that an error came from."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: "
    lines = []
    trace = error.__traceback__
    while trace:
        if Path(trace.tb_frame.f_code.co_filename).name == Path(name).name:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f"line {lines[-1]}: " if lines else ""


def describe(found: dict[str, str]) -> str:
    """Plugins of a checkpoint as options of a command line, with the beginning of their sha256."""
    parts = [f"--plugin={shown(path)} (sha256 {shown(d)[:DIGITS]}…)" for path, d in found.items()]
    return " ".join(parts)


def check_known(settings: dict[str, Any], found: Any) -> None:
    """Raises UserError for a network with parts of plugins that are not loaded.

    Args:
        settings: the config of a checkpoint.
        found: plugins of the checkpoint, path -> sha256, as it claims; None: it names none.
    """
    for kind in OF_THE_NETWORK:
        name = settings.get(kind)
        if not isinstance(name, str) or name in with_registered(kind, BUILT_IN[kind]):
            continue
        known = isinstance(found, dict) and all(
            isinstance(part, str) for item in found.items() for part in item
        )
        if known and found:
            raise UserError(
                f"it was trained with {describe(found)}, which defines {kind}={shown(name)}: add "
                "this option (or import the file in Python); a plugin is code, so read it first"
            )


def changed_plugins(found: dict[str, str]) -> list[str]:
    """Paths of loaded plugins whose sha256 is another than in `found`, path -> sha256."""
    return [path for path, digest in _loaded.items() if found.get(path, digest) != digest]


def warnings_of_changes(found: Any, checkpoint: Path) -> list[str]:
    """A warning for each loaded plugin that has changed since a checkpoint was saved.

    Args:
        found: plugins of the checkpoint, path -> sha256, as it claims; None: it names none.
        checkpoint: its file or folder.
    """
    known = found if isinstance(found, dict) else {}
    return [f"{path} has changed since {checkpoint} was saved" for path in changed_plugins(known)]


def forget() -> None:
    """Forgets all plugins; for tests."""
    _loaded.clear()
    for parts in _parts.values():
        parts.clear()
