"""Scripts by which a shell completes commands, options and their values: bash, zsh, fish.

They are written once, from the options of this version, and call no program while one types.
"""

import shlex

from ..errors import UserError
from .command_line import options_of

SHELLS = ("bash", "zsh", "fish")

BASH = """# gpt2 --completion=bash; load it with: eval "$(gpt2 --completion=bash)"
_gpt2() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} option="" words=""
  COMPREPLY=()
  # bash cuts --name=value into three words, zsh does not
  if [[ $cur == --*=* ]]; then
    option=${{cur%%=*}}
  elif [[ $cur == "=" ]]; then
    option=${{COMP_WORDS[COMP_CWORD-1]}} cur=""
  elif ((COMP_CWORD > 2)) && [[ ${{COMP_WORDS[COMP_CWORD-1]}} == "=" ]]; then
    option=${{COMP_WORDS[COMP_CWORD-2]}}
  fi
  if ((COMP_CWORD == 1)); then
    COMPREPLY=($(compgen -W "{commands} --help --version" -- "$cur"))
    return
  fi
  case "$command $option" in
{values}
    *" --"*) ;;
    *)
      case $command in
{options}
      esac ;;
  esac
  if [[ -n $option && $cur == --*=* ]]; then
    local value
    for value in $words; do words="$words $option=$value"; done
  fi
  if [[ -n $words && ( -n $option || $cur == -* || $command == shards ) ]]; then
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    [[ ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2>/dev/null
    return 0
  fi
  COMPREPLY=($(compgen -f -- "$cur"))
}}
complete -o filenames -F _gpt2 gpt2"""

ZSH = """#compdef gpt2
# gpt2 --completion=zsh; load it with: eval "$(gpt2 --completion=zsh)"
autoload -Uz compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit
"""


def script(
    shell: str, options: dict[str, type], commands: tuple[str, ...], of_shards: tuple[str, ...]
) -> str:
    """The script for a shell.

    Args:
        shell: bash, zsh or fish.
        options: the dataclass of options of each command that has some.
        commands: all commands of `gpt2`.
        of_shards: those of `gpt2 shards`.

    Raises:
        UserError: another shell.
    """
    if shell not in SHELLS:
        raise UserError(f"--completion={shell}: use one of {', '.join(SHELLS)}")
    found = {command: options_of(cls) for command, cls in options.items()}
    if shell == "fish":
        return _fish(found, commands, of_shards)
    bash = _bash(found, commands, of_shards)
    return bash if shell == "bash" else ZSH + bash.partition("\n")[2]


def _bash(
    found: dict[str, list[tuple[str, tuple[str, ...], str]]],
    commands: tuple[str, ...],
    of_shards: tuple[str, ...],
) -> str:
    values, lines = [], [f'        shards) words="{" ".join(of_shards)}" ;;']
    for command, options in found.items():
        names = " ".join(f"--{name}=" for name, _, _ in options)
        lines.append(f'        {command}) words="{names} --config= --help --help=all" ;;')
        for name, choices, _ in options:
            if choices:
                values.append(f'    "{command} --{name}") words="{" ".join(choices)}" ;;')
    return BASH.format(
        commands=" ".join(commands), values="\n".join(values), options="\n".join(lines)
    )


def _fish(
    found: dict[str, list[tuple[str, tuple[str, ...], str]]],
    commands: tuple[str, ...],
    of_shards: tuple[str, ...],
) -> str:
    lines = ["# gpt2 --completion=fish; load it with: gpt2 --completion=fish | source"]
    first = "complete -c gpt2 -n __fish_use_subcommand -f"
    lines.append(f"{first} -a {shlex.quote(' '.join((*commands, '--help', '--version')))}")
    after = "complete -c gpt2 -n '__fish_seen_subcommand_from {}'"
    lines.append(f"{after.format('shards')} -a {shlex.quote(' '.join(of_shards))}")
    for command, options in found.items():
        lines.append(f"{after.format(command)} -l help")
        lines.append(f"{after.format(command)} -l config -r")
        for name, choices, text in options:
            values = f" -x -a {shlex.quote(' '.join(choices))}" if choices else " -r"
            said = text.replace("\\", "").replace("'", "’")
            lines.append(f"{after.format(command)} -l {name}{values} -d '{said}'")
    return "\n".join(lines)
