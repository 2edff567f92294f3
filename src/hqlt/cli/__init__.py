"""The command line: `hqlt COMMAND`, one file a command. A command is a function; its arguments are the options."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable

from jsonargparse import ActionYesNo, ArgumentParser

from hqlt._version import version

COMMANDS = ("bench", "convert", "demo", "eval", "export", "generate", "reproduce")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the command. Ctrl-C ends with status 130."""
    parser = ArgumentParser(
        prog="hqlt", description="Hybrid memory layers: one layer, two memories.", version=version, allow_abbrev=False
    )
    subcommands = parser.add_subcommands()
    commands = {name: getattr(importlib.import_module(f"hqlt.cli.{name}"), name) for name in COMMANDS}
    for name, command in commands.items():
        subcommands.add_subcommand(name, options_of(command))
    given = parser.parse_args(arguments)
    options = parser.instantiate(given)[given.subcommand].as_dict()
    options.pop("config")
    try:
        commands[given.subcommand](**options)
    except KeyboardInterrupt:
        sys.exit(130)


def options_of(command: Callable[..., None]) -> ArgumentParser:
    """A parser with an option for each argument of the function, explained by its docstring. False becomes a flag."""
    import docstring_parser

    told = docstring_parser.parse(command.__doc__ or "")
    parser = ArgumentParser(
        description=command.__doc__ and command.__doc__.split("\n\n    Args:")[0], allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="a YAML or JSON file with options")
    flags: set[str | int] = {
        name for name, argument in inspect.signature(command).parameters.items() if argument.default is False
    }
    parser.add_function_arguments(command, as_positional=True, skip=flags)
    for argument in told.params:
        if argument.arg_name in flags:
            action = ActionYesNo(no_prefix="no-")
            parser.add_argument(f"--{argument.arg_name}", action=action, default=False, help=argument.description)
    for option in parser._actions:  # --top_p is also --top-p
        dashed = [name.replace("_", "-") for name in option.option_strings if "_" in name]
        option.option_strings = [*dashed, *option.option_strings]
        parser._option_string_actions.update(dict.fromkeys(dashed, option))
    return parser
