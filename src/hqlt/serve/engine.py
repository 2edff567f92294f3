"""Continuous batching: one thread reads prompts in chunks and decodes all running requests together.

The rows of a running batch are rows of `MemoryState`s, so requests join and leave between any two tokens:

    admit ─► read a chunk of prompts ─► one token for every row ─► remove finished rows ─► admit …

The text of a request depends on its own tokens, limits and seed alone, up to rounding: a matrix product may round
differently in a batch of another size. In float64 results agree to 1e-10; in float32 the model may choose the other of
two tokens whose logits differ by less than the rounding error.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hqlt.memory import MemoryState
from hqlt.model import HQLTCache, HQLTForCausalLM
from hqlt.serve.batch import EMPTY, Batch, Prefill, Row, concatenate
from hqlt.serve.request import DeadlineExceeded, EngineClosed, QueueFull, Request
from hqlt.serve.sampling import TokenLogprobs, sample, token_logprobs
from hqlt.state import PrefixStore

log = logging.getLogger("hqlt.serve")


class Engine:
    """Serves requests with one model, in its own thread.

    >>> engine = Engine(model, hqlt.state.PrefixStore(model))
    >>> engine.submit(Request(tokens=[1, 2, 3], max_tokens=10, listener=listener))
    >>> engine.close()

    Args:
        model: the language model; it is put into evaluation mode.
        store: keeps the states after prompts and continuations. A request starts from the longest stored prefix of its
            prompt.
        max_batch_size: maximum number of continuations that are decoded at once.
        max_queue: maximum number of requests that wait for a row.
        prefill_chunk: number of prompt tokens that are read between two decoding steps.
    """

    def __init__(
        self,
        model: HQLTForCausalLM,
        store: PrefixStore,
        *,
        max_batch_size: int = 32,
        max_queue: int = 256,
        prefill_chunk: int = 256,
    ) -> None:
        self.model, self.store = model.eval(), store
        self.max_batch_size, self.max_queue, self.prefill_chunk = max_batch_size, max_queue, prefill_chunk
        self.layers = [block.memory for block in model.model.layers]
        self._grows = [layer.kv is not None and layer.blend.slots is None for layer in self.layers]
        self._waiting: deque[Request] = deque()
        self._prefills: deque[Prefill] = deque()
        self._batch = EMPTY
        self._pending_stores: list[Callable[[], None]] = []
        """Calls that store states, made after the next decoding step so that they do not delay it."""
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="hqlt-serve", daemon=True)
        self._thread.start()

    # Called from any thread.

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: when the prompt is empty or n is not between 1 and `max_batch_size`.
            QueueFull: when `max_queue` requests are waiting.
            EngineClosed: when the engine is stopping.
        """
        if not len(request.prompt) or not 1 <= request.n <= self.max_batch_size:
            raise ValueError(
                f"expected a prompt of at least one token and 1 to {self.max_batch_size} continuations, got "
                f"{len(request.prompt)} tokens and {request.n} continuations"
            )
        with self._changed:
            if self._closing:
                raise EngineClosed("the server is stopping")
            if len(self._waiting) >= self.max_queue:
                raise QueueFull(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.append(request)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of rows in use, by continuations being decoded and prompts being read."""
        return len(self._batch.rows) + sum(prefill.request.n for prefill in list(self._prefills))

    def close(self) -> None:
        """Stop. The states of unfinished requests are stored, and their listeners receive `EngineClosed`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # Called in the engine's thread.

    def _run(self) -> None:
        with torch.no_grad():
            while self._wait():
                try:
                    self._admit()
                    self._read()
                    self._step()
                    self._flush_stores()
                except Exception as error:  # a bug in the engine: no client is left waiting
                    log.exception("all running requests failed")
                    self._drop_all(error)
            self._drop_all(EngineClosed("the server is stopping"))

    def _wait(self) -> bool:
        """Wait until there is work; returns False when the engine is closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self.running)
            return not self._closing

    def _flush_stores(self) -> None:
        pending, self._pending_stores = self._pending_stores, []
        for put in pending:
            self._quietly(put)

    def _drop_all(self, error: Exception) -> None:
        batch, self._batch = self._batch, EMPTY
        for i, row in enumerate(batch.rows):
            self._store_row(row, batch.states, i)
        for prefill in self._prefills:
            self._store_prompt(prefill.request, prefill.length, prefill.states)
        self._flush_stores()
        with self._changed:
            requests = [*(row.request for row in batch.rows), *(r.request for r in self._prefills), *self._waiting]
            self._prefills.clear()
            self._waiting.clear()
        for request in requests:
            self._fail(request, error, expected=True)

    def _admit(self) -> None:
        if not self._waiting:
            return
        now = time.monotonic()
        with self._changed:
            waiting = [request for request in self._waiting if not self._is_finished(request, now)]
            admitted, free = [], self.max_batch_size - self.running
            while waiting and waiting[0].n <= free:
                free -= waiting[0].n
                admitted.append(waiting.pop(0))
            self._waiting = deque(waiting)
        for request in admitted:
            try:
                length, states = self.store.find(torch.from_numpy(request.prompt), request.salt)
                request.listener.on_start(length)
                states = states or tuple(layer.init_state(1) for layer in self.layers)
                self._prefills.append(Prefill(request, length, states))
            except Exception as error:
                self._fail(request, error)

    def _is_finished(self, request: Request, now: float) -> bool:
        if now > request.deadline:
            self._fail(request, DeadlineExceeded("the request took longer than allowed"), expected=True)
        return request.finished

    def _read(self) -> None:
        """Read a chunk of prompt tokens, taking the prompts in turn. Prompts read to the end join the batch."""
        budget, now = self.prefill_chunk, time.monotonic()
        while self._prefills and budget > 0:
            prefill = self._prefills[0]
            request = prefill.request
            try:
                if not self._is_finished(request, now):
                    budget -= self._read_chunk(prefill, budget)
                    if prefill.length == prefill.end:
                        self._batch = concatenate([self._batch, self._rows_of(prefill)])
            except Exception as error:
                self._fail(request, error)
            self._prefills.popleft()
            if prefill.length < prefill.end and not request.finished:
                self._prefills.append(prefill)
            elif request.finished:
                self._store_prompt(request, prefill.length, prefill.states)

    def _read_chunk(self, prefill: Prefill, budget: int) -> int:
        """Read the next tokens of a prompt; returns their number."""
        begin, stop, request = prefill.length, prefill.next_stop(budget), prefill.request
        if stop > begin:
            chunk = torch.from_numpy(request.prompt[None, begin:stop]).to(self.model.device)
            _, prefill.states = self._forward(chunk, prefill.states)
            prefill.length = stop
            if stop == prefill.end or stop in request.checkpoints:
                self._store_prompt(request, stop, prefill.states)
        return stop - begin

    def _rows_of(self, prefill: Prefill) -> Batch:
        request = prefill.request
        rows = [Row(request, choice) for choice in range(request.n)]
        states = tuple(state.repeat(len(rows)) if len(rows) > 1 else state for state in prefill.states)
        return Batch(rows, [int(request.prompt[-1])] * len(rows), states)

    def _forward(self, tokens: Tensor, states: Sequence[MemoryState]) -> tuple[Tensor, tuple[MemoryState, ...]]:
        """tokens [b, t] → the normed hidden states of the last block [b, t, d], and the states after the tokens."""
        cache = HQLTCache.from_states(states, seen_tokens=1)  # any number: there is no attention mask
        return self.model.model(tokens, past_key_values=cache).last_hidden_state, cache.states

    def _step(self) -> None:
        """Generate one token for every row."""
        now = time.monotonic()
        batch = self._without(self._batch, [self._is_finished(row.request, now) for row in self._batch.rows])
        if not batch.rows:
            self._batch = batch
            return
        batch, logits = self._advance(batch)
        tokens = sample(logits, [row.sampling() for row in batch.rows]) if batch.rows else []
        logprobs = self._logprobs(batch.rows, logits, tokens)
        reasons = [self._take(*its) for its in zip(batch.rows, tokens, logprobs, strict=True)]
        batch = batch._replace(unread=[0 if token is None else token for token in tokens])
        self._batch = self._without(batch, [reason is not None for reason in reasons])
        for row, reason in zip(batch.rows, reasons, strict=True):  # after their states are stored
            if reason and not row.request.finished:
                self._end(row, reason)

    def _advance(self, batch: Batch) -> tuple[Batch, Tensor]:
        """Read the last token of each row; returns the batch after it and the logits of the next [b, vocabulary].

        If this fails, it is repeated with each half of the rows, until only the failing rows end.
        """
        try:
            tokens = torch.tensor(batch.unread, device=self.model.device)[:, None]
            hidden, states = self._forward(tokens, batch.states)
            return batch._replace(states=states), self.model.lm_head(hidden[:, -1])
        except Exception as error:
            n = len(batch.rows)
            if n == 1:
                self._fail(batch.rows[0].request, error)
                return EMPTY, torch.empty(0, self.model.config.vocab_size)
            halves = [self._advance(batch.select(range(*ends))) for ends in ((0, n // 2), (n // 2, n))]
            logits = torch.cat([part.to(self.model.device) for _, part in halves])
            return concatenate([half for half, _ in halves]), logits

    def _logprobs(self, rows: list[Row], logits: Tensor, tokens: list[int | None]) -> list[TokenLogprobs | None]:
        wanted = [i for i, row in enumerate(rows) if row.request.logprobs is not None and tokens[i] is not None]
        found: list[TokenLogprobs | None] = [None] * len(rows)
        if wanted:
            top = max(rows[i].request.logprobs or 0 for i in wanted)
            logprobs = token_logprobs(logits[wanted], [tokens[i] or 0 for i in wanted], top)
            for i, its in zip(wanted, logprobs, strict=True):
                found[i] = its._replace(top=its.top[: rows[i].request.logprobs])
        return found

    def _take(self, row: Row, token: int | None, logprobs: TokenLogprobs | None) -> str | None:
        """Add a token to a row; returns why the row ends with it, "" if it failed, None if it does not end."""
        request = row.request
        try:
            if token is None:
                raise FloatingPointError("the model's logits are not finite")
            row.generated.append(token)
            if token in request.end_tokens or request.listener.on_token(row.choice, token, logprobs):
                return "stop"
        except Exception as error:
            self._fail(request, error)
            row.state_is_valid = False
            return ""
        return "length" if len(row.generated) == request.max_tokens else None

    def _end(self, row: Row, reason: str) -> None:
        try:
            row.request.listener.on_end(row.choice, reason)
        except Exception as error:
            self._fail(row.request, error)

    def _without(self, batch: Batch, leaving: Sequence[bool]) -> Batch:
        """The batch without the rows that leave, whose states are stored."""
        if not any(leaving):
            return batch
        for i in itertools.compress(range(len(leaving)), leaving):
            self._store_row(batch.rows[i], batch.states, i)
        rest = batch.select([i for i, leaves in enumerate(leaving) if not leaves])
        return rest._replace(states=self._fitting(rest.states))

    def _fitting(self, states: Sequence[MemoryState]) -> tuple[MemoryState, ...]:
        """Shrink buffers that grow with the text (full attention) to the longest row."""
        return tuple(
            state.with_slots(int(state.position.max())) if grows else state
            for state, grows in zip(states, self._grows, strict=False)
        )

    def _store_row(self, row: Row, states: Sequence[MemoryState], i: int) -> None:
        """Store the state of a row."""

        def put() -> None:
            own = self._fitting([state.select([i]) for state in states])
            self.store.put(row.tokens_read(), own, row.request.salt)

        if row.state_is_valid:
            self._quietly(put)

    def _store_prompt(self, request: Request, length: int, states: Sequence[MemoryState]) -> None:
        """Store the state after the first `length` tokens of a prompt, once the next decoding step is done."""
        tokens = torch.from_numpy(request.prompt[:length])
        self._pending_stores.append(lambda: self.store.put(tokens, states, request.salt))

    def _fail(self, request: Request, error: Exception, expected: bool = False) -> None:
        if not expected:
            log.error("a request failed", exc_info=error)
        self._quietly(lambda: request.fail(error))

    @staticmethod
    def _quietly(call: Callable[[], Any]) -> None:
        """Make a call; an exception is logged and does not affect any request."""
        try:
            call()
        except Exception:
            log.exception("while serving a request")
