"""`hqlt chat`: a conversation with a model in the terminal, of which nothing is read twice."""

from __future__ import annotations

import contextlib
import difflib
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hqlt.cli.generate import check_drafts, check_sampling, drafts_for, expect
from hqlt.cli.progress import progress
from hqlt.cli.retention_options import RetentionOptions
from hqlt.data.text import printable
from hqlt.disk import check_writable
from hqlt.errors import explanation

if TYPE_CHECKING:
    from hqlt.language.chat import Chat
    from hqlt.language.template import Message

COMMANDS = {
    "save FILE": "save this conversation and its state to a file",
    "load FILE": "replace this conversation with the one in a file",
    "fork NAME": "continue under a new name; the old name keeps the conversation so far",
    "switch [NAME]": "switch to the conversation of that name; without a name, list all",
    "undo": "remove the last question and its answer",
    "retry": "generate another answer to the last question",
    "system [TEXT]": "set the system message; without a text, remove it",
    "help": "show this list",
    "quit": "leave, like Ctrl-D",
}
"""Commands after a slash and their descriptions. The first word names a method of `Session`."""


def chat(
    model: Path,
    system: str = "",
    max_new_tokens: int = 512,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int | None = None,
    seed: int | None = None,
    greedy: bool = False,
    store: Path | None = None,
    draft: Path | None = None,
    prompt_lookup: bool = False,
    device: str | None = None,
    **retention_options: Any,
) -> None:
    """Chat with a model. Each turn reads only what is new; /undo, /fork and /switch cost nothing.

    /help lists the commands, Ctrl-C ends an answer, Ctrl-D leaves. If stdin is a pipe, each line is a question or a
    command; if stdout is a pipe or file, it receives only the answers. Messages are formatted with the chat template of
    the model's tokenizer; without one, they follow "User:" and "Assistant:".

    Args:
        model: folder of a model, or of the run that trained it.
        system: system message.
        max_new_tokens: maximum number of tokens per answer.
        temperature: sampling temperature; 0 decodes greedily.
        top_p: sample from the smallest set of most likely tokens with at least this total probability.
        top_k: sample from this many of the most likely tokens.
        seed: random seed; the same seed and questions give the same answers. Default: a different seed at each start.
        greedy: always choose the most likely token.
        store: also keep the states of conversations in this folder, so that a known beginning is not read again after
            a restart. Several commands and models may share the folder; its contents may be deleted at any time.
        draft: folder or run of a smaller model with the same tokenizer, for speculative decoding: it proposes tokens,
            and the model checks several at a time. Answers stay the same and come faster if the proposals are right.
        prompt_lookup: speculative decoding without a draft model: propose what followed the last tokens at an earlier
            place in the conversation.
        device: device of the model, such as cpu; default: cuda if available.
    """
    sampling: Any = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "greedy": greedy}
    check_sampling(seed=seed, **sampling)
    expect("max-new-tokens", max_new_tokens, max_new_tokens >= 1, "at least 1")
    check_drafts(draft, prompt_lookup)
    if store is not None:
        check_writable(store, folder=True)
    from hqlt.device import usable_device
    from hqlt.language.chat import Chat
    from hqlt.language.folder import tokenizer_of
    from hqlt.language.template import is_plain
    from hqlt.state import PrefixStore

    notes = Console(stderr=True, soft_wrap=True, highlight=False)
    device_there, retention = usable_device(device), RetentionOptions(**retention_options)
    tokenizer = tokenizer_of(model, retention.config_of(model).vocab_size)
    language_model = retention.load(model, device_there, notes)
    drafts = drafts_for(draft, prompt_lookup, tokenizer, device_there)
    talk = Chat(language_model, tokenizer, PrefixStore(language_model, folder=store), drafts)
    session = Session(talk, notes, {"max_new_tokens": max_new_tokens, **sampling})
    if is_plain(tokenizer):
        notes.print(
            'this model has no chat template: messages follow "User:" and "Assistant:" in plain text',
            style="dim",
        )
    if system:
        session.system(system)
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    session.run()


class Session:
    """Named conversations, one of which is current, and the commands typed."""

    def __init__(self, chat: Chat, notes: Console, options: dict[str, Any]) -> None:
        self.chat, self.notes, self.options = chat, notes, options
        self.conversations: dict[str, list[Message]] = {"main": []}
        self.name = "main"
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()

    @property
    def messages(self) -> list[Message]:
        """The messages of the current conversation. The list is replaced, never modified."""
        return self.conversations[self.name]

    @messages.setter
    def messages(self, messages: list[Message]) -> None:
        self.conversations[self.name] = messages

    def run(self) -> None:
        """Answer until the input ends."""
        if self.terminal:
            edit_lines()
            self.note("/help lists the commands, Ctrl-C ends an answer, Ctrl-D leaves")
        while True:
            try:
                line = input(f"\1\33[1m\2{self.name}>\1\33[0m\2 " if self.terminal else "").rstrip()
                if line.startswith("/"):
                    self.command(*line[1:].split(maxsplit=1))
                elif line:
                    self.ask(line.strip())
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                self.note("\n/quit or Ctrl-D leaves")
            except Exception as error:
                if (message := explanation(error)) is None or isinstance(error, BrokenPipeError):
                    raise
                self.notes.print(message, style="red", markup=False)

    def note(self, text: str) -> None:
        self.notes.print(text, style="dim", markup=False)

    def ask(self, question: str) -> None:
        from hqlt.language.generation import PREFILL_CHUNK

        def write(text: str) -> None:
            sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()

        messages = [*self.messages, {"role": "user", "content": question}]
        bar = functools.partial(progress, "reading", least=PREFILL_CHUNK)
        answer = self.chat.answer(messages, write, progress=bar, **self.options)
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self.note(f"{answer}{' · stopped by Ctrl-C' if answer.interrupted else ''}")

    def command(self, name: str = "", argument: str = "") -> None:
        """Run a command. Raises ValueError if it is unknown or has a wrong argument."""
        arguments = {words.partition(" ")[0]: words.partition(" ")[2] for words in COMMANDS}
        if name not in arguments:
            near = difflib.get_close_matches(name, arguments, n=1)
            hint = f"; did you mean /{near[0]}?" if near else "; put a space before the slash to ask it as a question"
            raise ValueError(f"expected one of /{', /'.join(arguments)}, got /{name}{hint}")
        expected = arguments[name]
        if bool(argument) != bool(expected) and not expected.startswith("["):
            raise ValueError(f"/{name}: expected {expected or 'no argument'}, got {argument or 'no argument'}")
        getattr(self, name)(*[argument] * bool(expected))

    def save(self, file: str) -> None:
        from hqlt.state import load_notes

        path = Path(file).expanduser()
        if path.is_file():
            load_notes(path)  # refuses to overwrite anything but a state
        self.chat.save(path, self.messages)
        self.note(f"{path}: {path.stat().st_size / 1e6:.1f} MB")

    def load(self, file: str) -> None:
        self.messages = self.chat.load(Path(file).expanduser())
        self.note(f"{turns_of(self.messages)}; {last_answer(self.messages)}")

    def fork(self, name: str) -> None:
        if name in self.conversations:
            raise ValueError(f"/fork: expected a new name, got {name}, which exists; /switch {name} switches to it")
        self.conversations[name] = self.messages
        self.name = name
        self.note(f"{name}: {turns_of(self.messages)} in common")

    def switch(self, name: str) -> None:
        if not name:
            for other, messages in self.conversations.items():
                self.note(f"{'*' if other == self.name else ' '} {other}: {turns_of(messages)}")
            return
        if name not in self.conversations:
            raise ValueError(f"/switch: expected one of {', '.join(self.conversations)}, got {name}")
        self.name = name
        self.note(f"{name}: {turns_of(self.messages)}; {last_answer(self.messages)}")

    def undo(self) -> None:
        self.messages = self.last_turn("undo")[0]
        self.note(f"{turns_of(self.messages)}; {last_answer(self.messages)}")

    def retry(self) -> None:
        before, question = self.last_turn("retry")
        turn, self.messages = self.messages, before
        try:
            self.ask(question)
        finally:
            self.messages = turn if self.messages is before else self.messages

    def last_turn(self, command: str) -> tuple[list[Message], str]:
        """The messages before the last turn, and its question. Raises ValueError if there is no turn."""
        if len(self.messages) < 2:
            raise ValueError(f"/{command}: expected a question to have been asked, got an empty conversation")
        return self.messages[:-2], self.messages[-2]["content"]

    def system(self, text: str) -> None:
        if text and not self.chat.supports_system():
            raise ValueError("system: expected a chat template that supports a system message, got one that does not")
        others = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*[{"role": "system", "content": text}] * bool(text), *others]
        if others:
            self.note("the next answer will read the whole conversation again")

    def help(self) -> None:
        width = max(map(len, COMMANDS))
        for words, what in COMMANDS.items():
            self.note(f"/{words:<{width}}  {what}")

    def quit(self) -> None:
        raise EOFError


def turns_of(messages: list[Message]) -> str:
    turns = sum(message["role"] == "assistant" for message in messages)
    return f"{turns} turn{'' if turns == 1 else 's'}"


def last_answer(messages: list[Message]) -> str:
    """The end of the last answer, as a reminder."""
    text = " ".join(printable(messages[-1]["content"]).split()) if messages else ""
    return f"last: …{text[-60:]}" if text else "no messages yet"


def edit_lines() -> None:
    """Enable line editing at the prompt: history with the arrow keys, completion of commands with Tab."""
    with contextlib.suppress(ImportError):
        import readline

        words = [f"/{words.partition(' ')[0]}" for words in COMMANDS]
        readline.set_completer_delims(" ")
        readline.set_completer(lambda text, i: [*[w for w in words if text and w.startswith(text)], None][i])
        readline.parse_and_bind("tab: complete")
