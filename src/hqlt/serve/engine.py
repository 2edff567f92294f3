"""Continuous batching: one thread reads prompts in chunks and decodes all running requests together.

The rows of a running batch are rows of `MemoryState`s, so requests join and leave between any two tokens:

    admit ─► read a chunk of prompts ─► one token for every row ─► rows that end leave ─► admit …

A request's text depends on its own tokens, limits and seed alone. (In floating point a product of matrices may round
otherwise in a batch of another size: the laws hold to 1e-10 in float64, and a float32 model whose two likeliest tokens
are closer than its rounding error may choose the other one.)
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
from hqlt.serve.batch import NO_ROWS, Batch, Reading, Row, joined
from hqlt.serve.request import Closed, Full, Late, Request
from hqlt.serve.sampling import Likely, choose, likely
from hqlt.state import PrefixStore

log = logging.getLogger("hqlt.serve")


class Engine:
    """Serves requests with one model, in a thread of its own.

    >>> engine = Engine(model, hqlt.state.PrefixStore(model))
    >>> engine.submit(Request(tokens=[1, 2, 3], max_tokens=10, listener=listener))
    >>> engine.close()

    store: where states after prompts and continuations are kept; a request continues from the longest stored beginning
    of its prompt. max_batch_size: continuations that are decoded at once. max_queue: requests that may wait for a row.
    prefill_chunk: prompt tokens that are read between two decoding steps.
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
        self._grow = [layer.kv is not None and layer.blend.slots is None for layer in self.layers]
        self._waiting: deque[Request] = deque()
        self._reading: deque[Reading] = deque()
        self._batch = NO_ROWS
        self._unstored: list[Callable[[], None]] = []
        """What is stored once the next tokens are on their way."""
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="hqlt-serve", daemon=True)
        self._thread.start()

    # From any thread.

    def submit(self, request: Request) -> None:
        """Raises ValueError for what can never be served, Full where too many wait, Closed when it is too late."""
        if not len(request.prompt) or not 1 <= request.n <= self.max_batch_size:
            raise ValueError(
                f"expected a prompt of at least one token and 1 to {self.max_batch_size} continuations, got "
                f"{len(request.prompt)} tokens and {request.n} continuations"
            )
        with self._changed:
            if self._closing:
                raise Closed("the server is stopping")
            if len(self._waiting) >= self.max_queue:
                raise Full(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.append(request)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows in use: continuations that are decoded, and those whose prompts are read."""
        return len(self._batch.rows) + sum(reading.request.n for reading in list(self._reading))

    def close(self) -> None:
        """End what runs: what it has read is stored, and its listeners hear of a failure, `Closed`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # In the engine's own.

    def _run(self) -> None:
        with torch.no_grad():
            while self._wait():
                try:
                    self._admit()
                    self._read()
                    self._step()
                    self._store()
                except Exception as error:  # of the engine itself: no one waits for what will never come
                    log.exception("all running requests failed")
                    self._drop_all(error)
            self._drop_all(Closed("the server is stopping"))

    def _wait(self) -> bool:
        """Until there is something to do → whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self.running)
            return not self._closing

    def _store(self) -> None:
        unstored, self._unstored = self._unstored, []
        for put in unstored:
            self._quietly(put)

    def _drop_all(self, error: Exception) -> None:
        batch, self._batch = self._batch, NO_ROWS
        for i, row in enumerate(batch.rows):
            self._keep(row, batch.states, i)
        for reading in self._reading:
            self._put(reading.request, reading.length, reading.states)
        self._store()
        with self._changed:
            requests = [*(row.request for row in batch.rows), *(r.request for r in self._reading), *self._waiting]
            self._reading.clear()
            self._waiting.clear()
        for request in requests:
            self._fail(request, error, expected=True)

    def _admit(self) -> None:
        if not self._waiting:
            return
        now = time.monotonic()
        with self._changed:
            waiting = [request for request in self._waiting if not self._is_over(request, now)]
            admitted, free = [], self.max_batch_size - self.running
            while waiting and waiting[0].n <= free:
                free -= waiting[0].n
                admitted.append(waiting.pop(0))
            self._waiting = deque(waiting)
        for request in admitted:
            try:
                length, states = self.store.find(torch.from_numpy(request.prompt), request.salt)
                request.listener.began(length)
                states = states or tuple(layer.init_state(1) for layer in self.layers)
                self._reading.append(Reading(request, length, states))
            except Exception as error:
                self._fail(request, error)

    def _is_over(self, request: Request, now: float) -> bool:
        if now > request.deadline:
            self._fail(request, Late("the request took longer than it may"), expected=True)
        return request.over

    def _read(self) -> None:
        """A chunk of prompts, one after the other and the next time the next ones. What is read joins the batch."""
        budget, now = self.prefill_chunk, time.monotonic()
        while self._reading and budget > 0:
            reading = self._reading[0]
            request = reading.request
            try:
                if not self._is_over(request, now):
                    budget -= self._read_chunk(reading, budget)
                    if reading.length == reading.end:
                        self._batch = joined([self._batch, self._rows_of(reading)])
            except Exception as error:
                self._fail(request, error)
            self._reading.popleft()
            if reading.length < reading.end and not request.over:
                self._reading.append(reading)
            elif request.over:
                self._put(request, reading.length, reading.states)

    def _read_chunk(self, reading: Reading, budget: int) -> int:
        """→ tokens read."""
        begin, stop, request = reading.length, reading.next_stop(budget), reading.request
        if stop > begin:
            chunk = torch.from_numpy(request.prompt[None, begin:stop]).to(self.model.device)
            _, reading.states = self._forward(chunk, reading.states)
            reading.length = stop
            if stop == reading.end or stop in request.marks:
                self._put(request, stop, reading.states)
        return stop - begin

    def _rows_of(self, reading: Reading) -> Batch:
        request = reading.request
        rows = [Row(request, choice) for choice in range(request.n)]
        states = tuple(state.repeat(len(rows)) if len(rows) > 1 else state for state in reading.states)
        return Batch(rows, [int(request.prompt[-1])] * len(rows), states)

    def _forward(self, tokens: Tensor, states: Sequence[MemoryState]) -> tuple[Tensor, tuple[MemoryState, ...]]:
        """tokens: [b, t] → the normed hidden states of the last block [b, t, d], and the states after them."""
        cache = HQLTCache.from_states(states, seen_tokens=1)  # there is no mask, so nobody asks how many
        return self.model.model(tokens, past_key_values=cache).last_hidden_state, cache.states

    def _step(self) -> None:
        """One token for every row."""
        now = time.monotonic()
        batch = self._without(self._batch, [self._is_over(row.request, now) for row in self._batch.rows])
        if not batch.rows:
            self._batch = batch
            return
        batch, logits = self._advance(batch)
        tokens = choose(logits, [row.sampling() for row in batch.rows]) if batch.rows else []
        beside = self._beside(batch.rows, logits, tokens)
        ends = [self._take(*its) for its in zip(batch.rows, tokens, beside, strict=True)]
        batch = batch._replace(unread=[0 if token is None else token for token in tokens])
        self._batch = self._without(batch, [reason is not None for reason in ends])
        for row, reason in zip(batch.rows, ends, strict=True):  # now that what they have read is stored
            if reason and not row.request.over:
                self._tell(row, reason)

    def _advance(self, batch: Batch) -> tuple[Batch, Tensor]:
        """Each row's last token read, and the logits of the next [b, vocabulary].

        Where that fails it is tried with half of the rows: those that fail alone end, the others never know.
        """
        try:
            tokens = torch.tensor(batch.unread, device=self.model.device)[:, None]
            hidden, states = self._forward(tokens, batch.states)
            return batch._replace(states=states), self.model.lm_head(hidden[:, -1])
        except Exception as error:
            n = len(batch.rows)
            if n == 1:
                self._fail(batch.rows[0].request, error)
                return NO_ROWS, torch.empty(0, self.model.config.vocab_size)
            halves = [self._advance(batch.select(range(*ends))) for ends in ((0, n // 2), (n // 2, n))]
            logits = torch.cat([part.to(self.model.device) for _, part in halves])
            return joined([half for half, _ in halves]), logits

    def _beside(self, rows: list[Row], logits: Tensor, tokens: list[int | None]) -> list[Likely | None]:
        asking = [i for i, row in enumerate(rows) if row.request.logprobs is not None and tokens[i] is not None]
        found: list[Likely | None] = [None] * len(rows)
        if asking:
            top = max(rows[i].request.logprobs or 0 for i in asking)
            for i, its in zip(asking, likely(logits[asking], [tokens[i] or 0 for i in asking], top), strict=True):
                found[i] = its._replace(top=its.top[: rows[i].request.logprobs])
        return found

    def _take(self, row: Row, token: int | None, its: Likely | None) -> str | None:
        """A row's next token → why it ends with it, "" where it failed; None: it does not end."""
        request = row.request
        try:
            if token is None:
                raise FloatingPointError("the model's logits are not finite")
            row.made.append(token)
            if token in request.ends or request.listener.token(row.choice, token, its):
                return "stop"
        except Exception as error:
            self._fail(request, error)
            row.is_sound = False
            return ""
        return "length" if len(row.made) == request.max_tokens else None

    def _tell(self, row: Row, reason: str) -> None:
        try:
            row.request.listener.ended(row.choice, reason)
        except Exception as error:
            self._fail(row.request, error)

    def _without(self, batch: Batch, leaving: Sequence[bool]) -> Batch:
        """The batch without the rows that leave; what they have read is stored."""
        if not any(leaving):
            return batch
        for i in itertools.compress(range(len(leaving)), leaving):
            self._keep(batch.rows[i], batch.states, i)
        left = batch.select([i for i, leaves in enumerate(leaving) if not leaves])
        return left._replace(states=self._fitting(left.states))

    def _fitting(self, states: Sequence[MemoryState]) -> tuple[MemoryState, ...]:
        """Where buffers grow with a text, no larger than the longest row's."""
        return tuple(
            state.with_slots(int(state.position.max())) if grows else state
            for state, grows in zip(states, self._grow, strict=False)
        )

    def _keep(self, row: Row, states: Sequence[MemoryState], i: int) -> None:
        """Store what a row has read."""

        def put() -> None:
            own = self._fitting([state.select([i]) for state in states])
            self.store.put(row.tokens(), own, row.request.salt)

        if row.is_sound:
            self._quietly(put)

    def _put(self, request: Request, length: int, states: Sequence[MemoryState]) -> None:
        """Store what has been read of a prompt, after the next tokens."""
        tokens = torch.from_numpy(request.prompt[:length])
        self._unstored.append(lambda: self.store.put(tokens, states, request.salt))

    def _fail(self, request: Request, error: Exception, expected: bool = False) -> None:
        if not expected:
            log.error("a request failed", exc_info=error)
        self._quietly(lambda: request.fail(error))

    @staticmethod
    def _quietly(call: Callable[[], Any]) -> None:
        """A call whose failure is logged, and harms no request."""
        try:
            call()
        except Exception:
            log.exception("while serving a request")
