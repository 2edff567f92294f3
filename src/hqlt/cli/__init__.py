"""The command line, `hqlt COMMAND`, with one file per command.

A command is a function whose arguments are the options, or a dict of commands by name (`hqlt data prepare`). It raises
ValueError or OSError for errors that the user can fix; the message and exit status are handled here for all commands.
`hqlt --import MODULE COMMAND` first imports a module, for what it registers (hqlt.registry).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import io
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn, TypeAlias

from hqlt._version import version
from hqlt.errors import EXTRAS, explanation, first_line, how_to_install, is_out_of_memory
from hqlt.threads import Load, use_passive_wait_if_busy

Command: TypeAlias = "Callable[..., None] | dict[str, Command]"


class CommandInfo(NamedTuple):
    """An entry of the list of commands, available without importing the command."""

    summary: str
    packages: tuple[str, ...] = ()
    """Optional packages that the command needs."""


REPORT = ("matplotlib", "jinja2")
COMMANDS = {
    "train": CommandInfo("train a language model, for example on a text file", ("transformers", *REPORT)),
    "generate": CommandInfo("continue a text with a trained model", ("transformers",)),
    "chat": CommandInfo("chat with a model in the terminal", ("transformers",)),
    "serve": CommandInfo(
        "serve a model over HTTP with an OpenAI-compatible API", ("transformers", "fastapi", "uvicorn")
    ),
    "eval": CommandInfo("evaluate a model on benchmarks", ("transformers", "lm_eval")),
    "data": CommandInfo("prepare and check data folders of tokens"),
    "tokenizer": CommandInfo("train a tokenizer", ("tokenizers",)),
    "export": CommandInfo("export a model as a folder that transformers loads", ("transformers",)),
    "convert": CommandInfo("convert a pretrained model, or a checkpoint of the paper's code", ("transformers",)),
    "retrofit": CommandInfo("give a converted model a bounded memory", ("transformers", "peft")),
    "rl": CommandInfo("train and watch agents with memory", ("gymnasium", *REPORT)),
    "demo": CommandInfo("train six small models on three tasks, in minutes", ("transformers", *REPORT)),
    "reproduce": CommandInfo("reproduce a table of the paper, or run a study of your own", ("transformers", *REPORT)),
    "bench": CommandInfo("compare speed with other implementations"),
    "completion": CommandInfo("print a script that completes commands and options in bash or zsh", ("shtab",)),
}

IMPORT = (
    "  --import MODULE  first import your own module, whose hqlt.register(...) adds tasks, rules, environments, ..."
)
EXAMPLES = """\
  hqlt demo                                  compare hybrid memories with single ones, in minutes
  hqlt train --data=book.txt                 train a language model on a text file
  hqlt generate runs/tiny-book --prompt=The  continue a text with the trained model"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the arguments name (default: those of the command line).

    Errors that the user can fix (ValueError, OSError, out of memory, a missing package) are printed as one sentence to
    stderr, with exit status 1; Python's development mode (PYTHONDEVMODE=1) shows the traceback. Ctrl-C exits with
    status 130. If the reader of a pipe has closed it, the command exits silently with status 1. All other errors are
    bugs and show a traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # show characters that the terminal cannot encode as "?"
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        run_command(arguments, Load())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        if not stdout_closed():
            raise
        sys.exit(1)
    except Exception as error:
        message = explanation(error)
        if message is None or sys.flags.dev_mode:
            raise
        raise SystemExit(message) from None
    finally:
        flush()


def flush() -> None:
    """Flush stdout; discard the rest if its reader has closed it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stdout_closed() -> bool:
    """Whether stdout is a pipe without a reader, as after `| head`; otherwise another pipe is broken."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run_command(arguments: Sequence[str], machine: Load) -> None:
    """Find the command named by the first arguments and call it with the options in the others."""
    prog, command = "hqlt", None
    modules, arguments = modules_in(arguments)
    if arguments[:1] == ["--version"]:
        print(f"hqlt {version}")
        return
    while not callable(command):
        listed = {name: info.summary for name, info in COMMANDS.items()} if command is None else summaries(command)
        if arguments[:1] in ([], ["-h"], ["--help"]):
            print(overview(prog, listed))
            sys.exit(0 if arguments else 2)
        name, *arguments = arguments
        if name not in listed:
            near = difflib.get_close_matches(name, listed, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            exit_with_usage_error(f"{prog}: expected one of {', '.join(listed)}, got {name}{hint}")
        if command is None:
            from hqlt.cli.parser import dashed, parse, parser_of  # not needed for the list of commands

            use_passive_wait_if_busy(machine)  # before the command loads torch
            import_all(modules)
        prog, command = f"{prog} {name}", load(name) if command is None else command[name]
    options = parse(parser_of(command, prog), arguments)
    try:
        command(**options)
    except Exception as error:
        if is_out_of_memory(error):
            smaller = ", ".join(f"--{dashed(name)}" for name in MEMORY_OPTIONS if name in options) or "model or input"
            alternative = ", or --activation-checkpointing" if "activation_checkpointing" in options else ""
            error.add_note(f"try a smaller {smaller}{alternative}")
        raise


MEMORY_OPTIONS = ("micro_batch_size", "batch_size", "batch", "length", "num_envs", "workers", "preset", "model")
"""Options that increase memory use."""


def load(name: str) -> Command:
    """Import a command."""
    command: Command = getattr(importlib.import_module(f"hqlt.cli.{name}"), name)
    return command


def exit_with_usage_error(message: str) -> NoReturn:
    """Exit with status 2 because the command line is invalid."""
    sys.stderr.write(f"{message}\n")
    sys.exit(2)


def modules_in(arguments: Sequence[str]) -> tuple[list[str], Sequence[str]]:
    """The modules named by --import before the command, and the remaining arguments."""
    modules, rest = [], list(arguments)
    while rest and rest[0].partition("=")[0] == "--import":
        _, equals, name = rest.pop(0).partition("=")
        name = name if equals else rest.pop(0) if rest else ""
        if not name or name.startswith("-"):
            exit_with_usage_error("hqlt: --import: expected the name of a module, got none; see hqlt --help")
        modules.append(name)
    return modules, rest


def import_all(modules: Sequence[str]) -> None:
    """Import modules, also from the current folder. If one fails, exit with a message and status 2."""
    if modules:
        sys.path.insert(0, os.getcwd())
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            if sys.flags.dev_mode:
                raise
            file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]
            where = "" if file.startswith("<frozen importlib") or file == __file__ else f" ({file}, line {line})"
            exit_with_usage_error(
                f"hqlt: --import: expected a module that can be imported, got {name}: {type(error).__name__}: "
                f"{first_line(error)}{where}"
            )


def overview(prog: str, listed: Mapping[str, str]) -> str:
    """The list of commands, one per line."""
    width = max(map(len, listed))
    lines = [f"usage: {prog} COMMAND [options]", ""]
    for name, summary in listed.items():
        needed = COMMANDS[name].packages if prog == "hqlt" else ()
        extras = sorted({EXTRAS[package] for package in needed if importlib.util.find_spec(package) is None})
        missing = f" (requires: {how_to_install(*extras)})" if extras else ""
        lines.append(f"  {name:<{width}}  {summary}{missing}")
    if prog == "hqlt":
        lines[:0] = ["Hybrid memory layers: one layer, two memories.", ""]
        lines += ["", "before COMMAND, may be repeated:", IMPORT, "", "examples:", EXAMPLES]
    return "\n".join([*lines, "", f"The options of a command: {prog} COMMAND --help"])


def summaries(commands: Mapping[str, Command]) -> dict[str, str]:
    """The first sentence of the docstring of each command."""
    documented = {name: inspect.getdoc(command) or "" for name, command in commands.items()}
    return {name: re.split(r"\.\s", text, maxsplit=1)[0].rstrip(".") for name, text in documented.items()}
