"""Command lines and TOML files to dataclasses: `--name=value`, typed, with "did you mean".

A thin layer over argparse. One field is one option; a field that is itself a dataclass is a group
in `--help`. A TOML file is turned into options that stand before those of the command line, so
both are checked alike and the command line wins.
"""

import argparse
import dataclasses
import difflib
import functools
import math
import tomllib
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError

OPTIONAL = {"nargs": "?", "default": ""}
TRUE, FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and an exception instead of an exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(
    cls: type,
    argv: list[str],
    prog: str,
    positional: dict[str, str] | None = None,
    optional: tuple[str, ...] = (),
):
    """Turns arguments into an instance of `cls`; with `positional`, into (instance, values).

    Args:
        cls: a dataclass made of `option` fields and of groups (dataclasses of such fields).
        argv: arguments without the program's name.
        prog: name of the command, for the help text.
        positional: name -> help of arguments without dashes.
        optional: those of them that may be left out, and are "" then.

    Raises:
        UserError: unknown option, value of a wrong type, unreadable TOML file.
        SystemExit: after `--help`.
    """
    parser = _build_parser(cls, prog, positional or {}, optional)
    names = [name for action in parser._actions for name in action.option_strings]
    arguments = _expand_config_files([_normalise(a) for a in argv], names)
    for argument in arguments:
        _check_name(argument, names)
    given = vars(parser.parse_args(arguments))
    config = _instantiate(cls, given)
    return (config, [given[name] for name in positional]) if positional else config


def to_toml(flat: dict[str, Any]) -> str:
    """Settings as a TOML file that `--config=` reads back."""

    def text(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, str):
            escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            return f'"{escaped}"'
        return repr(value)

    return "".join(f"{name} = {text(value)}\n" for name, value in flat.items())


def _build_parser(
    cls: type, prog: str, positional: dict[str, str], optional: tuple[str, ...]
) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=cls.__doc__,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
    )
    for name, text in positional.items():
        parser.add_argument(name, help=text, **OPTIONAL if name in optional else {})
    parser.add_argument("--config", metavar="FILE.toml", help="read options from a TOML file")
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            group = parser.add_argument_group(f.type.__doc__.strip().rstrip("."))
            for inner in dataclasses.fields(f.type):
                _add_option(group, inner)
        else:
            _add_option(parser, f)
    return parser


def _add_option(parser: Any, f: dataclasses.Field):
    convert = {int: _int, float: _float, bool: _bool, str: str}[f.type]
    extra: dict[str, Any] = {"metavar": f.type.__name__.upper()}
    if choices := f.metadata["choices"]:
        extra = {"choices": choices}
        convert = functools.partial(_choice, choices)
    if f.type is bool or "True" in choices:  # the bare name means True
        extra |= {"nargs": "?", "const": "True"}
    default = f.default if f.default != "" else "empty"
    text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
    flags = [f"--{name}" for name in (f.name, f.metadata["alias"]) if name]
    parser.add_argument(*flags, type=convert, default=f.default, help=text, **extra)


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        value = float(text)  # 1e6 is a whole number too
        if not math.isfinite(value) or value != int(value):
            raise argparse.ArgumentTypeError(f"{text} is not a whole number") from None
        return int(value)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def _bool(text: str) -> bool:
    if text.lower() not in TRUE | FALSE:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in TRUE


_int.__name__, _float.__name__, _bool.__name__ = "whole number", "number", "True or False"


def _choice(choices: tuple[str, ...], text: str) -> str:
    """The choice that the text means: `true` is `True`."""
    return next((choice for choice in choices if choice.lower() == text.lower()), text)


def _normalise(argument: str) -> str:
    """`--grad-accum-steps=8` means `--grad_accum_steps=8`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _expand_config_files(arguments: list[str], names: list[str]) -> list[str]:
    """Replaces `--config=a.toml` by the options in the file, put before all others."""
    from_files, rest = [], []
    queue = iter(arguments)
    for argument in queue:
        if argument == "--config":
            from_files += _read_toml(next(queue, ""), names)
        elif argument.startswith("--config="):
            from_files += _read_toml(argument.partition("=")[2], names)
        else:
            rest.append(argument)
    return from_files + rest


def _read_toml(path: str, names: list[str]) -> list[str]:
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--config={path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a TOML file: {error}") from None
    arguments = []
    settings = [n for n in names if n not in ("-h", "--help", "--config")]
    for name, value in table.items():
        if not isinstance(value, bool | int | float | str):
            raise UserError(f"{path}: {name} must be a plain value (no tables, no lists)")
        argument = _normalise(f"--{name}={value}")
        _check_name(argument, settings, where=f"{path}: ")
        arguments.append(argument)
    return arguments


def _check_name(argument: str, names: list[str], where: str = ""):
    name = argument.partition("=")[0]
    if not name.startswith("--") or name in names or name == "--":
        return
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else "see --help for the list"
    raise UserError(f"{where}unknown option {name}; {hint}")


def _instantiate(cls: type, given: dict[str, Any]):
    values = {}
    for f in dataclasses.fields(cls):
        values[f.name] = (
            _instantiate(f.type, given) if dataclasses.is_dataclass(f.type) else given[f.name]
        )
    return cls(**values)
