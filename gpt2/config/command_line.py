"""Command lines and TOML files to dataclasses: `--name=value`, typed, with "did you mean".

A thin layer over argparse. A field of a dataclass is an option. A field that is itself a dataclass
is a group of options in `--help`. The settings of a TOML file become arguments that stand before
those of the command line: both are checked by the same code, and the command line wins.
"""

import argparse
import dataclasses
import difflib
import functools
import itertools
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..errors import UserError
from ..untrusted.display import shown
from ..untrusted.parsing import read_toml
from .options import choices_of, is_switch, type_of
from .other_names import CHECKPOINTS, meaning
from .registry import load_plugin
from .run_paths import check_not_renamed, from_here
from .values import FALSE, TRUE, to_bool, to_choice, to_float, to_int

Config = TypeVar("Config")
WITHOUT_EFFECT = {"schedule": "cosine", "cooldown": 0.4}  # of earlier versions, see `earlier`


FILES = {  # options that may name files and folders
    *("--config", "--data", "--data_dir", "--file", "--hellaswag", "--init", "--json", "--lambada"),
    *("--out", "--out_dir", "--plugin", "--resume", "--source", "--text", "--tokenizer", "--trace"),
}


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, one line, instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def print_help(self, file: Any = None) -> None:
        (file or sys.stdout).write(self.format_help())  # argparse's own hides that it could not


def parse(cls: type[Config], argv: list[str], prog: str) -> Config:
    """Turns arguments into an instance of `cls`.

    Args:
        cls: a dataclass made of `option` fields and of groups (dataclasses of such fields).
        argv: arguments without the program's name.
        prog: name of the command, for the help text.

    Raises:
        UserError: unknown option, value of a wrong type, unreadable TOML file.
        SystemExit: after `--help`.
    """
    config, _ = parse_with_positional(cls, argv, prog, {})
    return config


def parse_with_positional(
    cls: type[Config],
    argv: list[str],
    prog: str,
    positional: dict[str, str],
    optional: tuple[str, ...] = (),
    *,
    several: str = "",
) -> tuple[Config, list[Any]]:
    """Like `parse`, for a command that also takes arguments without dashes.

    Args:
        cls: as for `parse`.
        argv: as for `parse`.
        prog: as for `parse`.
        positional: name -> help of each argument without dashes.
        optional: names of the arguments that may be left out. Their value is "" then.
        several: name of the argument that is given once or more. Its value is a list.

    Returns:
        (instance of cls, values of the positional arguments in their order).
    """
    settings = {name for _, f in _options(cls) for name in _flags(f)}
    given = [at_home(_normalise(a)) for a in argv]
    begins = getattr(cls, "BEGINS_A_RUN", False)
    arguments = [at_home(a) for a in _expand_config_files(given, settings, begins)]
    if "plugin" in {f.name for _, f in _options(cls)}:
        _load_plugins(arguments, set(_plugins(given)))
    everything = "--help=all" in arguments
    arguments = ["--help" if argument == "--help=all" else argument for argument in arguments]
    for argument in arguments:
        if "checkpoint" in positional:
            to_folder = "folder" in positional
            _check_no_checkpoint(argument, arguments, settings, prog, to_folder=to_folder)
        _check_name(argument, settings | {"-h", "--help", "--config"})
    bare: list[str] = []
    if positional:
        arguments = _with_bare_switches(cls, arguments, bare)
    parser = _build_parser(cls, prog, everything)
    for name, text in positional.items():
        if name in optional:
            parser.add_argument(name, help=text, nargs="?", default="")
        elif name == several:
            parser.add_argument(name, help=text, nargs="+")
        else:
            parser.add_argument(name, help=text)
    found, more = parser.parse_known_args(arguments)
    if more:
        raise UserError("; ".join([f"unrecognized arguments: {' '.join(more)}", *bare]))
    values = vars(found)
    return _instantiate(cls, values), [values[name] for name in positional]


def parse_keywords(cls: type[Config], options: Mapping[str, Any], prog: str) -> Config:
    """An instance of `cls` from keywords of Python, checked as a command line is.

    Args:
        cls: as for `parse`.
        options: name -> value; `config` may name a TOML file.
        prog: name of the function, for messages.

    Raises:
        UserError: unknown name, value of a wrong type, unreadable TOML file.
    """
    names = {name.removeprefix("--") for _, f in _options(cls) for name in _flags(f)}
    check_keywords(options, names | {"config"}, prog)
    for name, value in options.items():
        if value is None:
            raise UserError(f"{prog}({name}=None): give a value, or leave it out")
    return parse(cls, [f"--{name}={_joined(value)}" for name, value in options.items()], prog)


def _joined(value: Any) -> Any:
    """Several values of an option as a command line has them: with commas."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def check_keywords(options: Iterable[str], names: Collection[str], prog: str) -> None:
    """Raises UserError for a keyword that is none of `names`, with the closest of them."""
    for name in options:
        if name not in names:
            hint = _hint(name, names) or f"use {', '.join(sorted(names))}"
            raise UserError(f"{prog}({shown(name)}=…): unknown option; {hint}")


def options_of(cls: type) -> list[tuple[str, tuple[str, ...], str]]:
    """(name, values that are allowed or (), help) of every option that `--help=all` shows."""
    found = []
    for _, f in _options(cls):
        if f.name not in getattr(cls, "HIDDEN", ()):
            values = ("True", "False") if type_of(f) is bool else f.metadata["choices"]
            found.append((f.name, values, f.metadata["help"]))
    return found


def to_toml(settings: Mapping[str, Any]) -> str:
    """Settings as the text of a TOML file."""
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in settings.items())


def _toml_value(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # TOML has JSON's escapes, and wants one for DEL as well
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _options(cls: type) -> Iterator[tuple[str, dataclasses.Field]]:
    """(title of its group, field) of every option; the title is "" outside of groups."""
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            title = (f.type.__doc__ or "").strip().rstrip(".")
            yield from ((title, inner) for inner in dataclasses.fields(f.type))
        else:
            yield "", f


def fields_of(cls: type) -> list[dataclasses.Field]:
    """The field of every option."""
    return [f for _, f in _options(cls)]


def _flags(f: dataclasses.Field) -> list[str]:
    """The names of an option on the command line."""
    return [f"--{name}" for name in (f.name, f.metadata["alias"]) if name]


def _with_bare_switches(cls: type, arguments: list[str], bare: list[str]) -> list[str]:
    """`--private CKPT` as `--private=True CKPT`: a switch takes only its own values.

    Args:
        cls: a dataclass of options.
        arguments: of the command line.
        bare: gets a note of each such switch, for a message.
    """
    switches = {flag: f for _, f in _options(cls) if is_switch(f) for flag in _flags(f)}
    found = list(arguments)
    for i, (name, behind) in enumerate(itertools.pairwise(arguments)):
        choices = map(str.lower, choices_of(switches[name])) if name in switches else ()
        if name in switches and behind.lower() not in {*TRUE, *FALSE, *choices}:
            found[i] = f"{name}=True"
            bare.append(f"{name} {behind} was taken as {name}=True and a name")
    return found


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's, wider; examples and tables stay as they are."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=100)


def _build_parser(cls: type, prog: str, everything: bool) -> _Parser:
    """The parser of all options of `cls`.

    Its help names the options in `cls.DAILY`, in that order, and everything with `--help=all`; a
    class without DAILY has few options and shows them all. Those in `cls.HIDDEN` are never shown.
    """
    hidden, daily = set(getattr(cls, "HIDDEN", ())), list(getattr(cls, "DAILY", ()))
    options = [(title, f) for title, f in _options(cls)]
    shown = [f.name for _, f in options if f.name not in hidden]
    end = getattr(cls, "HELP_END", "")
    if daily and not everything:
        options.sort(key=lambda found: daily.index(found[1].name) if found[1].name in daily else 99)
        options = [("", f) for _, f in options]
        end += f"\n\n`{prog} --help=all` lists {len(shown) - len(daily)} more options."
        shown = daily
    parser = _Parser(
        prog=prog,
        description=f"The daily options of `{prog}`." if shown == daily else cls.__doc__,
        epilog=end or None,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        usage=f"{prog} [--NAME=VALUE …]" if daily else None,
    )
    parser.add_argument("--config", metavar="FILE.toml", help="read options from a TOML file")
    groups: dict[str, Any] = {"": parser}
    for title, f in options:
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_option(groups[title], f, f.name in shown)
    return parser


def _add_option(parser: Any, f: dataclasses.Field, shown: bool) -> None:
    kind = type_of(f)
    convert: Any = {int: to_int, float: to_float, bool: to_bool, str: str}[kind]
    extra: dict[str, Any] = {"metavar": kind.__name__.upper()}
    choices = choices_of(f)
    if choices:
        extra = {"choices": choices}
        convert = functools.partial(to_choice, choices)
    if is_switch(f):  # the bare name means True
        extra |= {"nargs": "?", "const": "True"}
    default = f.default if f.default != "" else "empty"
    text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
    if not shown:
        text = argparse.SUPPRESS
    parser.add_argument(*_flags(f), type=convert, default=f.default, help=text, **extra)


def at_home(argument: str) -> str:
    """The argument with the home folder in place of ~, which shells leave as it is behind a =."""
    name, equals, value = argument.partition("=")
    if name not in FILES or "~" not in value or "\0" in value:  # the latter is no name of a file
        return argument
    return f"{name}{equals}{','.join(map(os.path.expanduser, value.split(',')))}"


def _normalise(argument: str) -> str:
    """`--grad-accum-steps=8` means `--grad_accum_steps=8`."""
    if not argument.startswith("--"):
        return argument
    _, equals, value = argument.partition("=")
    return f"--{option_name(argument)}{equals}{value}"


def option_name(argument: str) -> str:
    """The name of the option in an argument: of `--max-steps=9` it is `max_steps`."""
    return argument.removeprefix("--").partition("=")[0].replace("-", "_")


def _expand_config_files(arguments: list[str], settings: set[str], begins: bool) -> list[str]:
    """Replaces `--config=a.toml` by the settings in the file, put before all other arguments.

    Args:
        arguments: of the command line.
        settings: names of the options.
        begins: whether a run begins in --out_dir=, which may be that of a renamed run.
    """
    files, rest = [], []
    queue = iter(arguments)
    for argument in queue:
        if argument == "--config":
            files.append(next(queue, ""))
        elif argument.startswith("--config="):
            files.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    read = [(Path(name), read_toml(Path(name), f"--config={name}")) for name in files]
    naming = [(path, content["out_dir"]) for path, content in read if "out_dir" in content]
    asked = {argument.partition("=")[0] for argument in rest}
    if begins and naming and not asked & {"--out_dir", "--help", "-h"}:
        check_not_renamed(*naming[-1])
    from_files = (_arguments_of(path, content, settings) for path, content in read)
    return [*itertools.chain.from_iterable(from_files), *rest]


def _plugins(arguments: list[str]) -> list[str]:
    """The values of `--plugin` among arguments."""
    behind = [b for a, b in itertools.pairwise(arguments) if a == "--plugin"]
    return behind + [a.partition("=")[2] for a in arguments if a.startswith("--plugin=")]


def _load_plugins(arguments: list[str], named: set[str]) -> None:
    """Runs the plugins of the command line, whose names become choices of options.

    Raises:
        UserError: a TOML file, which may be a stranger's, names a plugin that `named` lacks.
    """
    for value in filter(None, dict.fromkeys(_plugins(arguments))):
        if value not in named:
            raise UserError(
                f"this recipe needs {shown(value)}, which is code: read it, then say so with "
                f"--plugin={shown(value)} beside --config="
            )
        for path in value.split(","):
            load_plugin(path)


def _arguments_of(path: Path, content: dict[str, Any], settings: set[str]) -> list[str]:
    """The settings of a TOML file as arguments."""
    arguments = []
    settings_there = from_here(path, content)
    if settings_there.items() >= WITHOUT_EFFECT.items():
        del settings_there["cooldown"]
    for name, value in settings_there.items():
        if not isinstance(value, bool | int | float | str):
            raise UserError(f"{path}: {name} must be a plain value (no tables, no lists)")
        argument = _normalise(f"--{name}={value}")
        _check_name(argument, settings, where=f"{path}: ")
        arguments.append(argument)
    return arguments


def _check_name(argument: str, names: set[str], where: str = "") -> None:
    """Raises UserError for an option that is none of `names`, with the closest of them."""
    name = argument.partition("=")[0]
    if not name.startswith("--") or name in names or name == "--":
        return
    # equal dashes would bring names closer
    hint = _hint(name[2:], {ours.removeprefix("--") for ours in names}, dashes="--")
    raise UserError(f"{where}unknown option {name}; {hint or 'see --help for the list'}")


def _check_no_checkpoint(
    argument: str, others: list[str], settings: set[str], prog: str, *, to_folder: bool
) -> None:
    """Raises UserError for an option that names what stands without dashes here."""
    name, _, value = argument.partition("=")
    if name not in CHECKPOINTS or name in settings or (name == "--out_dir" and "--out" in settings):
        return
    places = [other for other in others if not other.startswith("-")]  # or values of options
    if value in ("", "resume", "scratch") or (places and value not in places):
        place = "CHECKPOINT"  # nanoGPT's words, or the checkpoint is there already
    else:
        place = value
    if to_folder and name == "--out_dir":
        place = f"CHECKPOINT {value or 'FOLDER'}"
    raise UserError(f"unknown option {name}; write: {prog} {place} …")


def _hint(name: str, names: Collection[str], dashes: str = "") -> str:
    """What is probably meant by a name that is none of `names`, or advice; "" for neither."""
    if found := meaning(name, set(names)):
        close, note = found
    else:
        close, note = next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.6)), ""), ""
    if not close:
        return note
    return f"did you mean {dashes}{close}?{f' ({note})' * bool(note)}"


def _instantiate(cls: type, given: dict[str, Any]) -> Any:
    """An instance of `cls` and of its groups, with the values that argparse found."""
    values = {}
    for f in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(f.type)
        values[f.name] = _instantiate(type_of(f), given) if nested else given[f.name]
    return cls(**values)
