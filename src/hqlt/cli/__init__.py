"""The command line: `hqlt COMMAND`, one file a command.

A command is a function, whose arguments are the options, or a dict of commands by name: `hqlt data prepare`. It raises
ValueError or OSError for what its user can mend; what is said about it, and the status, are the same for all commands
and decided here. `hqlt --import MODULE COMMAND` imports a module first, for what it registers (hqlt.registry).
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


class About(NamedTuple):
    """What the list of commands says of one, without importing it."""

    what: str
    packages: tuple[str, ...] = ()
    """Optional ones that it needs."""


PAGES = ("matplotlib", "jinja2")
COMMANDS = {
    "train": About("train a language model, on a text file for one", ("transformers", *PAGES)),
    "generate": About("continue a text with a trained model", ("transformers",)),
    "chat": About("talk with a model, in the terminal", ("transformers",)),
    "serve": About("serve a model over HTTP, as OpenAI's API", ("transformers", "fastapi", "uvicorn")),
    "eval": About("score a model on benchmarks", ("transformers", "lm_eval")),
    "data": About("prepare and check folders of tokens"),
    "tokenizer": About("train a tokenizer", ("tokenizers",)),
    "export": About("write a model as a folder that transformers loads", ("transformers",)),
    "convert": About("convert a pretrained model, or a checkpoint of the paper's code", ("transformers",)),
    "retrofit": About("give a converted model a bounded memory", ("transformers", "peft")),
    "rl": About("train and watch agents with a memory", ("gymnasium", *PAGES)),
    "demo": About("train five small models on three tasks, in minutes", ("transformers", *PAGES)),
    "reproduce": About("reproduce a table of the paper, or run a study of your own", ("transformers", *PAGES)),
    "bench": About("measure speed beside other implementations"),
    "completion": About("print a script that completes commands and options in bash or zsh", ("shtab",)),
}

IMPORT = "  --import MODULE  import a module of your own first, whose hqlt.register(...) adds tasks, rules, worlds, ..."
EXAMPLES = """\
  hqlt demo                                  two memories beside one, in a few minutes
  hqlt train --data=book.txt                 a language model of a text file
  hqlt generate runs/tiny-book --prompt=The  continue a text with it"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the arguments name (by default those of the command line).

    What a user can mend (ValueError, OSError, memory that is out, a package that is missing) is a sentence on stderr
    and status 1; in Python's development mode (PYTHONDEVMODE=1) its traceback is shown. Ctrl-C ends with status 130,
    and a pipe whose reader has left ends the command with status 1 and without a word. All else is a fault of the
    program, and shows its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what the terminal's encoding does not have is shown as "?"
    given = sys.argv[1:] if arguments is None else arguments
    try:
        run_command(given, Load())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        if not reader_left():
            raise
        sys.exit(1)
    except Exception as error:
        said = explanation(error)
        if said is None or sys.flags.dev_mode:
            raise
        raise SystemExit(said) from None
    finally:
        flush()


def flush() -> None:
    """Write what is still buffered for stdout; nothing more is written there where its reader has left."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reader_left() -> bool:
    """Whether nobody reads the pipe that stdout is, as after `| head`; another pipe may have broken."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run_command(arguments: Sequence[str], machine: Load) -> None:
    """Find the command that the first arguments name, and call it with what the others say."""
    prog, command = "hqlt", None
    modules, arguments = modules_in(arguments)
    if arguments[:1] == ["--version"]:
        print(f"hqlt {version}")
        return
    while not callable(command):
        listed = {name: about.what for name, about in COMMANDS.items()} if command is None else summaries(command)
        if arguments[:1] in ([], ["-h"], ["--help"]):
            print(overview(prog, listed))
            sys.exit(0 if arguments else 2)
        name, *arguments = arguments
        if name not in listed:
            near = difflib.get_close_matches(name, listed, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            refuse(f"{prog}: expected one of {', '.join(listed)}, got {name}{meant}")
        if command is None:
            from hqlt.cli.parser import dashed, parse, parser_of  # now: a list of commands needs none of it

            use_passive_wait_if_busy(machine)  # before the command loads torch
            import_all(modules)
        prog, command = f"{prog} {name}", load(name) if command is None else command[name]
    options = parse(parser_of(command, prog), arguments)
    try:
        command(**options)
    except Exception as error:
        if is_out_of_memory(error):
            smaller = ", ".join(f"--{dashed(name)}" for name in SMALLER if name in options) or "model or input"
            instead = ", or --activation-checkpointing" if "activation_checkpointing" in options else ""
            error.add_note(f"try a smaller {smaller}{instead}")
        raise


SMALLER = ("micro_batch_size", "batch_size", "batch", "length", "num_envs", "workers", "preset", "model")
"""Options that memory in use grows with."""


def load(name: str) -> Command:
    command: Command = getattr(importlib.import_module(f"hqlt.cli.{name}"), name)
    return command


def refuse(what: str) -> NoReturn:
    """End with status 2, because the command line cannot be read."""
    sys.stderr.write(f"{what}\n")
    sys.exit(2)


def modules_in(arguments: Sequence[str]) -> tuple[list[str], Sequence[str]]:
    """The modules that are named by --import before the command, and the arguments that follow."""
    modules, rest = [], list(arguments)
    while rest and rest[0].partition("=")[0] == "--import":
        _, equals, name = rest.pop(0).partition("=")
        name = name if equals else rest.pop(0) if rest else ""
        if not name or name.startswith("-"):
            refuse("hqlt: --import: expected the name of a module, got none; see hqlt --help")
        modules.append(name)
    return modules, rest


def import_all(modules: Sequence[str]) -> None:
    """Import them, from the current folder too; one that cannot be ends the program with a sentence and status 2."""
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
            refuse(
                f"hqlt: --import: expected a module that can be imported, got {name}: {type(error).__name__}: "
                f"{first_line(error)}{where}"
            )


def overview(prog: str, listed: Mapping[str, str]) -> str:
    """The commands, a line each."""
    width = max(map(len, listed))
    lines = [f"usage: {prog} COMMAND [options]", ""]
    for name, what in listed.items():
        needed = COMMANDS[name].packages if prog == "hqlt" else ()
        extras = sorted({EXTRAS[package] for package in needed if importlib.util.find_spec(package) is None})
        missing = f" (first: {how_to_install(*extras)})" if extras else ""
        lines.append(f"  {name:<{width}}  {what}{missing}")
    if prog == "hqlt":
        lines[:0] = ["Hybrid memory layers: one layer, two memories.", ""]
        lines += ["", "before COMMAND, as often as wanted:", IMPORT, "", "examples:", EXAMPLES]
    return "\n".join([*lines, "", f"The options of a command: {prog} COMMAND --help"])


def summaries(commands: Mapping[str, Command]) -> dict[str, str]:
    """The first sentence of each command's documentation."""
    documented = {name: inspect.getdoc(command) or "" for name, command in commands.items()}
    return {name: re.split(r"\.\s", text, maxsplit=1)[0].rstrip(".") for name, text in documented.items()}
