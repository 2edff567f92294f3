"""`hqlt completion`: the script with which a shell completes commands, options and values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from hqlt._version import version
from hqlt.cli import COMMANDS, Command, load, summaries
from hqlt.cli.parser import dashed, parser_of
from hqlt.errors import extra_for, require

EQUALS_IN_BASH = """
# bash takes --name=value apart at "=": completed as --name value.
_hqlt() {
  local words=() position=$COMP_CWORD i
  for i in "${!COMP_WORDS[@]}"; do
    if [[ ${COMP_WORDS[i]} != "=" ]]; then
      words+=("${COMP_WORDS[i]}")
    elif (( i == COMP_CWORD )); then
      words+=("")
    elif (( i < COMP_CWORD )); then
      (( position -= 1 ))
    fi
  done
  local COMP_WORDS=("${words[@]}") COMP_CWORD=$position
  _shtab_hqlt
}
complete -o bashdefault -F _hqlt hqlt
"""


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Print the script with which a shell completes hqlt's commands, options and values.

    For bash: `hqlt completion bash > ~/.local/share/bash-completion/completions/hqlt`; for zsh, write it to a file
    `_hqlt` in a folder of `$fpath`. `hqlt --import MODULE completion bash` includes what the module registers. The
    script is static: print it again after an update of hqlt.

    Args:
        shell: bash or zsh.
    """
    require("shtab")
    import shtab

    script: str = shtab.complete(command_tree(), shell)
    if shell == "bash":
        script += EQUALS_IN_BASH
    else:  # --name=[ in place of --name[: the value may follow "=", too
        script = re.sub(r'^(\s+"--[\w.-]+)(\[.*\]:\S+:)', r"\1=\2", script, flags=re.MULTILINE)
    print(script)


def command_tree() -> argparse.ArgumentParser:
    """All commands and options as one parser of argparse; it is read by shtab, and parses nothing."""
    root = argparse.ArgumentParser(prog="hqlt", description="Hybrid memory layers.")
    root.add_argument("--version", action="version", version=version)
    root.add_argument("--import", metavar="MODULE", help="import a module first")
    commands = {name: loaded(name) for name in COMMANDS}
    add_commands(root, commands, {name: info.summary for name, info in COMMANDS.items()}, known_values())
    return root


def loaded(name: str) -> Command:
    """A command; an empty group of commands if an optional package that it needs is missing."""
    try:
        return load(name)
    except ModuleNotFoundError as error:
        if extra_for(error) is None:
            raise
        return {}


def add_commands(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, Command],
    summary: Mapping[str, str],
    values: Mapping[str, list[str]],
) -> None:
    """Add commands by name, with their options, and groups of commands."""
    group = parser.add_subparsers()
    for name, command in commands.items():
        prog = f"{parser.prog} {name}"
        child = group.add_parser(name, prog=prog, help=summary[name], description=summary[name])
        if not callable(command):
            if command:
                add_commands(child, command, summaries(command), values)
            continue
        for action in parser_of(command, prog)._actions:
            if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
                add_option(child, action, values)


def add_option(parser: argparse.ArgumentParser, action: argparse.Action, values: Mapping[str, list[str]]) -> None:
    """Add an option or argument of a command, with the values or paths that complete it."""
    import shtab

    name = action.dest
    expected = getattr(action, "_typehint", None if name == "print_config" else Path)  # groups of options take a file
    types = {expected, *get_args(expected)}
    options: dict[str, Any] = {"help": re.split(r"\.\s|;", (action.help or "").replace("%", "%%"))[0].rstrip(".")}
    if name == "print_config" or (bool in types and action.default is False):
        options["action"] = "store_true"
    elif bool in types:
        options["choices"] = ["true", "false"]
    elif get_origin(expected) is Literal:
        options["choices"] = list(get_args(expected))
    elif str in types and name in values:
        options["choices"] = values[name]
    added = parser.add_argument(*([dashed(option) for option in action.option_strings] or [name]), **options)
    if Path in types:
        added.__dict__["complete"] = shtab.FILE


def known_values() -> dict[str, list[str]]:
    """By option: the names that it takes."""
    from hqlt.agent.memory_model import memory_names
    from hqlt.model.presets import PRESETS
    from hqlt.registry import HOME, names

    registered = {kind: names(kind) for kind in HOME}
    return {**registered, "env": registered["world"], "memory": memory_names(), "preset": list(PRESETS)}
