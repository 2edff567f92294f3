"""The command line: `hqlt COMMAND`, one file a command.

A command is a function, whose arguments are the options, or a dict of commands by name: `hqlt data prepare`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeAlias

from jsonargparse import ActionYesNo, ArgumentParser, set_parsing_settings

from hqlt._version import version
from hqlt.errors import EXTRAS, reason

COMMANDS = ("bench", "convert", "data", "demo", "eval", "export", "generate", "reproduce", "rl", "tokenizer", "train")

Command: TypeAlias = "Callable[..., None] | dict[str, Command]"


class Parser(ArgumentParser):
    """A parser that knows what was meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parsers = (self, *_subparsers(self))
        options = [name for parser in parsers for name in parser._option_string_actions]
        wrong = re.findall(r"(?<!\S)--([\w-]+)", message if "nrecognized arguments" in message else "")
        wrong += re.findall(r"does not accept option '([\w.]+)'", message)  # in a file
        near = [difflib.get_close_matches(f"--{name}", options, n=1) for name in wrong]
        for choice in re.findall(r"invalid choice: '([\w-]+)'", message):
            near.append(difflib.get_close_matches(choice, [name for parser in parsers for name in commands_of(parser)]))
        for names in near:
            message += f"; did you mean {names[0]}?" if names else ""
        super().error(message, ex)


def _subparsers(parser: ArgumentParser) -> list[ArgumentParser]:
    """Of the command that was given, at every depth."""
    found: list[ArgumentParser] = []
    for name, below in commands_of(parser).items():
        if name in sys.argv:
            found += [below, *_subparsers(below)]
    return found


def commands_of(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    return {
        name: below
        for action in parser._actions
        for name, below in (getattr(action, "_name_parser_map", None) or {}).items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the command. Ctrl-C ends with status 130.

    What the command line says goes before what its --config says, in whatever order they stand.
    """
    arguments = config_first(sys.argv[1:] if arguments is None else arguments)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog="hqlt", description="Hybrid memory layers: one layer, two memories.", version=version, allow_abbrev=False
    )
    asked = arguments[:1]
    names = [name for name in COMMANDS if asked == [name]] or COMMANDS  # to list the options of all takes seconds
    loaded = {name: load(name, asked == [name]) for name in names}
    commands = {name: command for name, command in loaded.items() if command is not None}
    add_commands(parser, commands)
    chosen: Command = commands
    try:
        options = parser.instantiate(parser.parse_args(arguments)).as_dict()
    except ValueError as error:  # settings in a group of their own, such as --ppo.rollout
        raise SystemExit(f"--{error}") from None
    while isinstance(chosen, dict):
        name = options["subcommand"]
        chosen, options = chosen[name], options[name]
    options.pop("config")
    try:
        chosen(**options)
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        raise SystemExit(reason(error)) from None


def config_first(arguments: Sequence[str]) -> list[str]:
    """The same arguments, files of options before the other options."""
    begin = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    files: list[str] = []
    others: list[str] = []
    rest = iter(arguments[begin:])
    for argument in rest:
        if argument == "--config":
            files += [argument, *itertools.islice(rest, 1)]
        else:
            (files if argument.startswith("--config=") else others).append(argument)
    return [*arguments[:begin], *files, *others]


def load(name: str, asked: bool) -> Command | None:
    """A command; None where a package is missing that it alone needs. Asked for, it then says which."""
    try:
        command: Command = getattr(importlib.import_module(f"hqlt.cli.{name}"), name)
        return command
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        if asked:
            raise SystemExit(f"{name}: {reason(error)}") from None
        return None


def add_commands(parser: ArgumentParser, commands: dict[str, Command]) -> None:
    subcommands = parser.add_subcommands()
    for name, command in commands.items():
        if isinstance(command, dict):
            group = Parser(description=f"One of: {', '.join(command)}.", allow_abbrev=False)
            subcommands.add_subcommand(name, group)
            add_commands(group, command)
        else:
            subcommands.add_subcommand(name, options_of(command))


def options_of(command: Callable[..., None]) -> ArgumentParser:
    """A parser with an option for each argument of the function, explained by its docstring. False becomes a flag."""
    import docstring_parser

    told = docstring_parser.parse(command.__doc__ or "")
    parser = Parser(description=command.__doc__ and command.__doc__.split("\n\n    Args:")[0], allow_abbrev=False)
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
