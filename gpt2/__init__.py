"""GPT-2 from scratch: `from gpt2 import GPT2`."""

__all__ = ["GPT2"]


def __getattr__(name: str) -> object:
    if name == "GPT2":  # imported when asked for: torch takes seconds, `gpt2 --help` must not
        from .api import GPT2

        return GPT2
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
