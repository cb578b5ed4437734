"""GPT-2 from scratch: `from gpt2 import GPT2`, `gpt2.train(…)`."""

import importlib
import types
from typing import Any

from . import train

# Name -> module of the package that has it; imported when asked for, because torch takes seconds.
_LAZY = {
    "GPT2": "api",
    "GPT2Config": "config.model",
    "ModernConfig": "config.model",
    "TrainConfig": "config.train",
    "TrainResult": "commands.from_python",
    "UserError": "errors",
    "load_plugin": "config.registry",
    "register": "config.registry",
    "run": "train.loop",
}
__all__ = [
    "GPT2",
    "GPT2Config",
    "ModernConfig",
    "TrainConfig",
    "TrainResult",
    "UserError",
    "load_plugin",
    "register",
    "run",
    "train",
]


class _Train(types.ModuleType):
    """The package `gpt2.train`, which is also the function of this name."""

    def __call__(self, *, progress: bool | None = None, **options: Any) -> Any:
        """Trains, or continues, a run: `gpt2 train` with its options as keywords.

        result = gpt2.train(data_dir="data/mine", size="gpt2-mini", mlp="relu2", max_steps=200)

        Args:
            progress: a bar instead of lines; None: in a notebook.
            **options: those of `gpt2 train --help`, also `config="recipe.toml"`.

        Returns:
            A `TrainResult`: metrics, losses, the model, and a picture that notebooks show.

        Raises:
            UserError: whatever the command line answers with one line.
            KeyboardInterrupt: Ctrl-C, after all is saved; its `result` is the `TrainResult` so far.
        """
        from .commands.from_python import train as train_here

        return train_here(progress=progress, **options)


train.__class__ = _Train  # a module is its own class's instance; `gpt2.train.loop` stays a module


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _version() -> str:
    """The version of the installed package, or of the checkout that is run without installing."""
    from importlib import metadata
    from pathlib import Path

    from .errors import DISTRIBUTION
    from .untrusted.parsing import read_toml

    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        project = Path(__file__).parent.parent / "pyproject.toml"
        return read_toml(project)["project"]["version"]
