"""Run tasks of EleutherAI's lm-evaluation-harness (0.4.13) on our models."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
from jinja2 import TemplateError
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from hqlt.data import Tokenizer
from hqlt.data.network import offline_if_unreachable
from hqlt.errors import first_line
from hqlt.evaluate.likelihood import CHUNK, likelihoods
from hqlt.model import HQLTForCausalLM

Job = TypeVar("Job")

LOCAL_TASKS = Path(str(resources.files("hqlt.evaluate"))) / "tasks"


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A language model as the harness expects it. Results do not depend on the batch size.

    Texts are tokenized as by the harness's own `hf` model, and with the same `max_length` the scores are equal.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        batch_size: number of rows read at once.
        max_length: maximum number of tokens read to predict the next one, as in the harness's own models: contexts are
            truncated on the left, and rolling log-likelihoods are computed window by window. If None, nothing is
            truncated: texts are read in chunks, and each token is predicted from all tokens before it.
    """

    def __init__(
        self, model: HQLTForCausalLM, tokenizer: Tokenizer, batch_size: int = 8, max_length: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.text_tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length

    @functools.cached_property
    def eot_token_id(self) -> int:
        """The token that ends texts, or a newline if there is none.

        Raises:
            ValueError: if the tokenizer has neither.
        """
        if self.text_tokenizer.eos_id is not None:
            return self.text_tokenizer.eos_id
        newline = self.text_tokenizer.encode("\n")
        if not newline:
            raise ValueError(
                f"{self.text_tokenizer.name}: expected a tokenizer with an eos_token to put before texts, got none"
            )
        return newline[0]

    @functools.cached_property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the one that begins texts, or else the one that ends them."""
        return self.eot_token_id if self.text_tokenizer.bos_id is None else self.text_tokenizer.bos_id

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer_name(self) -> str:
        return self.text_tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize a text.

        Args:
            string: the text.
            add_special_tokens: whether to add the tokenizer's special tokens; if None, they are added unless the text
                already begins with one.
            kwargs: ignored.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.text_tokenizer.spelling(self.prefix_token_id))
        return self.text_tokenizer.encode_prompt(string, add_special_tokens)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations given contexts.

        Raises:
            ValueError: if a continuation has no tokens; every model would give it probability 1.
        """
        pairs = [request.args for request in requests]
        return self._loglikelihood_tokens([(pair, *self.encode_pair(*pair)) for pair in pairs], disable_tqdm)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenize a context and its continuation, split as by the harness.

        The harness moves trailing spaces to the continuation; a context of spaces alone is therefore empty.
        """
        empty: tuple[list[int], list[int]] = [], self.tok_encode(continuation, add_special_tokens=False)
        before, after = self._encode_pair(context, continuation) if context else empty
        if before:
            return before, after
        own = after[:1] == [self.prefix_token_id]
        return (after[:1], after[1:]) if own else ([self.prefix_token_id], after)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        if empty := [request for request, _, continuation in requests if not continuation]:
            raise ValueError(f"continuation: expected at least one token, got none for {empty[0]!r}")
        pairs = [(self.truncate(context, len(continuation)), continuation) for _, context, continuation in requests]
        lengths = [len(context) + len(continuation) for context, continuation in pairs]
        for some in self.batches(range(len(requests)), lengths, disable_tqdm):
            rows = [pairs[i] for i in some]
            for i, (log_p, greedy) in zip(some, likelihoods(self.model, rows), strict=True):
                results[i] = (log_p, greedy)
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        windows = [self.windows(self.tok_encode(text)) for text in texts]
        rows = [(None, *window) for some in windows for window in some]
        log_p = iter([log_p for log_p, _ in self._loglikelihood_tokens(rows, disable_tqdm)])
        results = [sum(islice(log_p, len(some)), 0.0) for some in windows]
        for text, result in zip(texts, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), result)
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        results = [""] * len(requests)
        by_options = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[1]))
        for _, group in groupby(by_options, key=lambda i: repr(requests[i].args[1])):
            members = list(group)
            options = requests[members[0]].args[1]
            new = normalize_gen_kwargs(options)["max_gen_toks"]
            if new < 1:
                raise ValueError(f"max_gen_toks: expected at least 1, got {new}")
            texts = {i: self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in members}
            contexts = {i: self.truncate(tokens, new + 1) for i, tokens in texts.items()}
            for some in self.batches(members, [len(contexts[i]) for i in members], disable_tqdm):
                for i, text in zip(some, self.generate_texts([contexts[i] for i in some], options), strict=True):
                    results[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return results

    def truncate(self, context: list[int], new: int) -> list[int]:
        """Truncate a context on the left so that it fits with `new` tokens after it, of which the last is not read.

        Raises:
            ValueError: if there is no room for any context.
        """
        if self.max_length is None:
            return context
        if new > self.max_length:
            raise ValueError(
                f"max_length: expected at least {new} for the tokens after a context, got {self.max_length}"
            )
        return context[-(self.max_length + 1 - new) :]

    def windows(self, tokens: list[int]) -> list[tuple[list[int], list[int]]]:
        """Split a text into the harness's rolling windows: (context, continuation), each token in one continuation."""
        size = self.max_length or max(len(tokens), 1)
        rolling = get_rolling_token_windows(tokens, self.prefix_token_id, max_seq_len=size, context_len=1)
        return [make_disjoint_window(window) for window in rolling]

    def generate_texts(self, contexts: list[list[int]], options: dict[str, Any]) -> list[str]:
        """Generate a text after each context, up to the first of the stop strings."""
        choice: dict[str, Any] = dict(normalize_gen_kwargs(options))
        until, new = [stop for stop in choice.pop("until") if stop], choice.pop("max_gen_toks")
        if self.text_tokenizer.eos_id is not None:
            until.append(self.text_tokenizer.spelling(self.text_tokenizer.eos_id))
        if not choice["do_sample"]:
            choice.pop("temperature", None)
        longest = max(map(len, contexts))
        tokens = torch.tensor([[0] * (longest - len(row)) + row for row in contexts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in contexts], device=self.device)
        untyped: Any = self.model
        made = untyped.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=new,
            prefill_chunk_size=CHUNK,
            pad_token_id=0 if self.text_tokenizer.eos_id is None else self.text_tokenizer.eos_id,
            eos_token_id=self.text_tokenizer.eos_id,
            stopping_criteria=StoppingCriteriaList([StopStrings(until, self.text_tokenizer, longest)]),
            **choice,
        )
        texts = [self.decoded(row[longest:].tolist()) for row in made]
        return [min((text.split(stop)[0] for stop in until), key=len, default=text) for text in texts]

    def decoded(self, ids: list[int]) -> str:
        """Decode tokens up to the first end-of-text token."""
        end = ids.index(self.text_tokenizer.eos_id) if self.text_tokenizer.eos_id in ids else len(ids)
        return self.text_tokenizer.decode(ids[:end])

    def batches(self, jobs: Iterable[Job], lengths: Sequence[int], silent: bool) -> Iterable[list[Job]]:
        """Batch jobs of similar length, the longest first, so that running out of memory happens early."""
        order = [job for _, job in sorted(zip(lengths, jobs, strict=True), key=lambda pair: -pair[0])]
        parts = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        notes = Console(stderr=True)
        return track(parts, "batches", console=notes, transient=True, disable=silent or not notes.is_terminal)


class StopStrings(StoppingCriteria):
    """Stops a row when its new text contains one of the strings."""

    def __init__(self, until: list[str], tokenizer: Tokenizer, prompt: int) -> None:
        self.until, self.text_tokenizer, self.prompt = until, tokenizer, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = [self.text_tokenizer.decode(row[self.prompt :].tolist()) for row in input_ids]
        return torch.tensor([any(stop in text for stop in self.until) for text in texts], device=input_ids.device)


def load_tasks(names: Sequence[str], local: Path | None = None) -> list[Any]:
    """Load tasks and groups of the harness by name, with their data.

    Args:
        names: names of tasks, tags or groups.
        local: a folder with data for our local tasks (`lambada_local`, …) and optionally with task files in the
            harness's format, in which {local} stands for the folder. Python files next to them, named by `!function`,
            are executed.

    Returns:
        The harness's tasks and groups.

    Raises:
        ValueError: for an unknown name, or a task whose package, Python file or data is missing.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    sources = [] if local is None else [(LOCAL_TASKS, local), (local, local)]
    unknown, silent, hint = list[str](), "", f"see the files in {local}"
    with tempfile.TemporaryDirectory() as filled, contextlib.ExitStack() as stack:
        try:
            places = [copy_task_files(Path(filled) / str(i), *each) for i, each in enumerate(sources)]
            manager = TaskManager(include_path=places, include_defaults=False)
            here = manager.all_tasks
            if not set(names) <= set(here):
                manager = TaskManager(include_path=places)
                hint = "tasks on local files need no network, such as --local FOLDER --tasks lambada_local"
                silent = stack.enter_context(offline_if_unreachable())
            unknown = [name for name in names if name not in manager.all_tasks]
            loaded = {} if unknown else manager.load(list(names))
        except ImportError as error:  # a package that a task needs, or a Python file that it names
            raise ValueError(f"tasks: {error}") from error
        except Exception as error:  # raised by many libraries: network, hub, file formats, YAML
            why = f"{silent}{type(error).__name__}: {first_line(error)}"
            raise ValueError(f"tasks: expected tasks whose data can be loaded, got {why}; {hint}") from error
    if unknown:
        own = f"local tasks are {', '.join(here)}" if here else "local tasks need --local"
        raise ValueError(f"tasks: expected names of the harness's tasks, got unknown {', '.join(unknown)}; {own}")
    below = {name for members in loaded["group_map"].values() for name in members}
    return [task for name, task in (loaded["groups"] | loaded["tasks"]).items() if name not in below]


def run_tasks(model: HarnessModel, tasks: Sequence[Any], limit: int | None = None) -> dict[str, Any]:
    """Run the harness.

    Args:
        model: the model.
        tasks: what `load_tasks` returns.
        limit: number of documents per task; None for all.

    Returns:
        Results by task and metric, including those of every task in a group.

    Raises:
        ValueError: if a task's template does not fit its data.
    """
    try:
        results = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            bootstrap_iters=100,
            log_samples=False,
        )
    except TemplateError as error:
        raise ValueError(f"tasks: expected templates that fit the data, got {error}") from error
    assert results is not None, "None only in processes other than the first"
    return dict(results["results"])


def copy_task_files(folder: Path, source: Path, local: Path) -> Path:
    """Copy a folder's task files, with {local} replaced by the local folder's path, and its Python files."""
    folder.mkdir()
    for file in sorted(source.glob("*.yaml")):
        text = file.read_text(encoding="utf-8").replace("{local}", str(local.resolve()))
        (folder / file.name).write_text(text, encoding="utf-8")
    for file in sorted(source.glob("*.py")):
        shutil.copyfile(file, folder / file.name)
    return folder
