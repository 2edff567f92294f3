"""`hqlt chat`: a conversation with a model in the terminal, in which nothing is read twice."""

from __future__ import annotations

import contextlib
import difflib
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hqlt.cli.generate import check_choice, check_drafts, drafts_for, expect
from hqlt.cli.progress import progress
from hqlt.cli.retention_options import RetentionOptions
from hqlt.data.text import printable
from hqlt.disk import check_writable
from hqlt.errors import explanation

if TYPE_CHECKING:
    from hqlt.language.chat import Chat
    from hqlt.language.template import Message

COMMANDS = {
    "save FILE": "keep this conversation and the state after it in a file",
    "load FILE": "continue the conversation in a file, in the place of this one",
    "fork NAME": "go on under a new name; the conversation so far stays under the old one, too",
    "switch [NAME]": "to the conversation of that name; without one: list them",
    "undo": "take the last question back, and its answer",
    "retry": "another answer to the last question",
    "system [TEXT]": "what the model is told before all else; without a text: nothing",
    "help": "these lines",
    "quit": "leave, as Ctrl-D does",
}
"""What can be typed after a slash, and what it does. By the first word, a method of `Session`."""


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
    """Talk with a model. Each turn reads only what is new; /undo, /fork and /switch cost nothing.

    /help lists the commands, Ctrl-C ends an answer, Ctrl-D leaves. Where stdin is a pipe, each of its lines is a
    question or a command; into a pipe or a file go the answers alone. Messages are written in the chat template of the
    model's tokenizer; where it has none, after "User:" and "Assistant:".

    Args:
        model: a model's folder, or the run that trained it.
        system: what the model is told before the conversation.
        max_new_tokens: maximum number of tokens per answer.
        temperature: below 1 the likely gets likelier; 0 is greedy.
        top_p: choose among the likeliest tokens that have this probability together.
        top_k: choose among this many of the likeliest tokens.
        seed: the same seed and questions make the same answers; another one at each start by default.
        greedy: always the likeliest token.
        store: keep the states of conversations in this folder, too, so that what begins like one is not read again at
            another start. Many commands and models may share it; what is in it may be deleted at any time.
        draft: the folder or run of a smaller model with the same tokenizer. It proposes tokens that the model checks
            several at a time, so that answers come faster where it is right, and are the same.
        prompt_lookup: propose what followed the last tokens where they stood in the conversation before.
        device: where the model runs, such as cpu; cuda where there is one by default.
    """
    choice: Any = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "greedy": greedy}
    check_choice(seed=seed, **choice)
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
    session = Session(talk, notes, {"max_new_tokens": max_new_tokens, **choice})
    if is_plain(tokenizer):
        notes.print(
            'no chat template beside this model: it continues a text in which messages stand after "User:" and '
            '"Assistant:"',
            style="dim",
        )
    if system:
        session.system(system)
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    session.run()


class Session:
    """Conversations by name, the one that goes on, and what is typed."""

    def __init__(self, chat: Chat, notes: Console, choice: dict[str, Any]) -> None:
        self.chat, self.notes, self.choice = chat, notes, choice
        self.conversations: dict[str, list[Message]] = {"main": []}
        self.name = "main"
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()

    @property
    def messages(self) -> list[Message]:
        """Of the conversation that goes on: a value, which is replaced, never changed."""
        return self.conversations[self.name]

    @messages.setter
    def messages(self, messages: list[Message]) -> None:
        self.conversations[self.name] = messages

    def run(self) -> None:
        """Answer until there are no more questions."""
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
                if (said := explanation(error)) is None or isinstance(error, BrokenPipeError):
                    raise
                self.notes.print(said, style="red", markup=False)

    def note(self, text: str) -> None:
        self.notes.print(text, style="dim", markup=False)

    def ask(self, question: str) -> None:
        from hqlt.language.generation import PREFILL_CHUNK

        def told(text: str) -> None:
            sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()

        asked = [*self.messages, {"role": "user", "content": question}]
        reading = functools.partial(progress, "reading", least=PREFILL_CHUNK)
        answer = self.chat.answer(asked, told, reading=reading, **self.choice)
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        self.note(f"{answer}{' · ended by Ctrl-C' if answer.interrupted else ''}")

    def command(self, name: str = "", argument: str = "") -> None:
        """Do what a line after its slash says. Raises ValueError for what is no command."""
        takes = {words.partition(" ")[0]: words.partition(" ")[2] for words in COMMANDS}
        if name not in takes:
            near = difflib.get_close_matches(name, takes, n=1)
            meant = f" (did you mean /{near[0]}?)" if near else "; a blank before the slash makes it a question"
            raise ValueError(f"expected one of /{', /'.join(takes)}, got /{name}{meant}")
        if bool(argument) != bool(takes[name]) and not takes[name].startswith("["):
            raise ValueError(f"/{name}: expected {takes[name] or 'nothing'} behind it, got {argument or 'nothing'}")
        getattr(self, name)(*[argument] * bool(takes[name]))

    def save(self, file: str) -> None:
        from hqlt.state import load_notes

        path = Path(file).expanduser()
        if path.is_file():
            load_notes(path)  # refuses to replace anything but a state
        self.chat.save(path, self.messages)
        self.note(f"{path}: {path.stat().st_size / 1e6:.1f} MB")

    def load(self, file: str) -> None:
        self.messages = self.chat.load(Path(file).expanduser())
        self.note(f"{told_of(self.messages)}; {last_words(self.messages)}")

    def fork(self, name: str) -> None:
        if name in self.conversations:
            raise ValueError(f"/fork: expected a new name, got {name}, which is taken; /switch {name} goes there")
        self.conversations[name] = self.messages
        self.name = name
        self.note(f"{name}: {told_of(self.messages)} in common")

    def switch(self, name: str) -> None:
        if not name:
            for other, messages in self.conversations.items():
                self.note(f"{'*' if other == self.name else ' '} {other}: {told_of(messages)}")
            return
        if name not in self.conversations:
            raise ValueError(f"/switch: expected one of {', '.join(self.conversations)}, got {name}")
        self.name = name
        self.note(f"{name}: {told_of(self.messages)}; {last_words(self.messages)}")

    def undo(self) -> None:
        self.messages = self.last_turn("undo")[0]
        self.note(f"{told_of(self.messages)}; {last_words(self.messages)}")

    def retry(self) -> None:
        before, question = self.last_turn("retry")
        turn, self.messages = self.messages, before
        try:
            self.ask(question)
        finally:
            self.messages = turn if self.messages is before else self.messages

    def last_turn(self, command: str) -> tuple[list[Message], str]:
        """What stands before it, and its question. Raises ValueError where there is none."""
        if len(self.messages) < 2:
            raise ValueError(f"/{command}: expected a turn, but nothing has been asked yet")
        return self.messages[:-2], self.messages[-2]["content"]

    def system(self, text: str) -> None:
        if text and not self.chat.takes_system():
            raise ValueError("system: expected a chat template with a place for it, but this model's has none")
        others = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*[{"role": "system", "content": text}] * bool(text), *others]
        if others:
            self.note("the next answer reads the whole conversation again")

    def help(self) -> None:
        width = max(map(len, COMMANDS))
        for words, what in COMMANDS.items():
            self.note(f"/{words:<{width}}  {what}")

    def quit(self) -> None:
        raise EOFError


def told_of(messages: list[Message]) -> str:
    turns = sum(message["role"] == "assistant" for message in messages)
    return f"{turns} turn{'' if turns == 1 else 's'}"


def last_words(messages: list[Message]) -> str:
    """The end of the last answer, to know where one is."""
    said = " ".join(printable(messages[-1]["content"]).split()) if messages else ""
    return f"last: …{said[-60:]}" if said else "nothing said yet"


def edit_lines() -> None:
    """At the prompt: earlier lines by the arrow keys, commands completed by the tabulator."""
    with contextlib.suppress(ImportError):
        import readline

        words = [f"/{words.partition(' ')[0]}" for words in COMMANDS]
        readline.set_completer_delims(" ")
        readline.set_completer(lambda text, i: [*[w for w in words if text and w.startswith(text)], None][i])
        readline.parse_and_bind("tab: complete")
