"""GPT-2 from scratch: `from gpt2 import GPT2`."""

import importlib

__all__ = ["GPT2"]

# Name -> module of the package that has it; imported when asked for, because torch takes seconds.
_LAZY = {
    "GPT2": "api",
    "load_plugin": "config.registry",
    "register": "config.registry",
}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
