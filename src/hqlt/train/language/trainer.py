"""The loop: read, predict, correct, keep. One process or many run the same lines."""

from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from hqlt.data import Stream, TokenFiles, Windows
from hqlt.data.windows import rows_of_rank
from hqlt.memory import MemoryState
from hqlt.model import HQLTCache, HQLTConfig, HQLTForCausalLM
from hqlt.signals import stop_if_asked
from hqlt.task.task import IGNORE, SPLITS, Batch, Split
from hqlt.train.fit import parameter_groups
from hqlt.train.language.checkpoints import DistributedCheckpoints
from hqlt.train.language.cost import flops_per_token, peak_flops
from hqlt.train.language.ranks import Ranks, gradient_sync, local, parallelize
from hqlt.train.language.settings import TrainSettings
from hqlt.train.live import memory_in_use
from hqlt.train.run import Trainer as Base

FIXED = ("length", "batch_size", "seed", "carry_state")
"""Settings that a checkpoint's place in the data depends on; others may change when a run goes on."""

PATIENCE = 50
"""Updates in a row with gradients that are not finite, after which training ends."""
KEPT = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight."""


class Update(NamedTuple):
    """What is told after an update."""

    step: int
    """Updates done, skipped ones included."""
    loss: float
    """Nats per scored token."""
    gradient_norm: float
    """Before clipping."""
    learning_rate: float
    tokens: int
    """Seen since the run began, over all processes."""
    skipped: int
    """Updates skipped so far, because a gradient was not finite or no token was scored."""
    validation: float | None = None
    """Bits per byte of the validation text, where it was measured."""

    @property
    def units(self) -> int:
        return self.tokens

    def as_line(self) -> dict[str, Any]:
        return self._asdict()


class Trainer(Base[Update]):
    """A model, its optimiser and its place in the data.

    Nothing in its checkpoints depends on how many processes wrote them: batch i holds the same rows for any number of
    ranks, and weights are whole once loaded.

    Raises ValueError for data that do not suit the model, and for a checkpoint of another run.
    """

    kind, unit = "language", "tokens"
    checkpoints: DistributedCheckpoints
    step = 0

    def __init__(self, settings: TrainSettings, config: HQLTConfig, data: Path, folder: Path, ranks: Ranks) -> None:
        self.settings, self.config, self.ranks = settings, config, ranks
        self.device, self.extra_state = ranks.device, {}
        train = TokenFiles(data, "train")
        if len(train) <= train.documents:
            raise ValueError(
                f"data: expected documents of two tokens or more, the second to be predicted from the first, got "
                f"{train.documents} of one token in {train.folder}"
            )
        there = [split for split in SPLITS if train.manifest.splits.get(split)]
        self.splits = {split: TokenFiles(data, split) for split in there}
        self.held_out = {split: Windows(self.splits[split], settings.length) for split in there if split != "train"}
        if train.vocab_size > config.vocab_size:
            raise ValueError(
                f"data: expected tokens of a vocabulary of at most {config.vocab_size}, which the model has, got "
                f"{train.vocab_size}; give --model.vocab_size={train.vocab_size}"
            )
        self._refuse_unscored()
        if settings.carry_state:
            refuse_unbounded(config)
            self.source: Windows | Stream = Stream(train, settings.length, settings.batch_size)
        else:
            self.source = Windows(train, settings.length, settings.seed)
        self.micro_batches, self.micro_rows = settings.micro_batches(ranks.count)
        torch.manual_seed(settings.seed)
        self.model: Any = parallelize(HQLTForCausalLM(config), settings, ranks)
        self.size = sum(parameter.numel() for parameter in self.model.parameters())
        self.parameters = dict(self.model.named_parameters())
        fused = self.device.type == "cuda"  # one kernel for all weights, instead of some ten passes over them
        self.optimiser = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=fused,
        )
        for parameter in self.parameters.values():  # as AdamW itself does at its first step: all is there to be loaded
            kept = {name: torch.zeros_like(parameter) for name in KEPT}
            step = torch.zeros((), device=self.device if fused else "cpu")
            self.optimiser.state[parameter] = {"step": step, **kept}
        self.skipped, self.skipped_in_a_row = 0, 0
        self.loss: float | None = None
        """Of the last update; None before the first one here."""
        self.caches: list[HQLTCache] = []
        """The memories of each micro-batch's rows, where they are carried."""
        self.checkpoints = DistributedCheckpoints(folder / "checkpoints", settings.keep_checkpoints, ranks)
        self._peak: float | None = None
        self._flops = 0.0

    def updates(self) -> Iterator[Update]:
        """Raises ValueError too, once training diverged."""
        while self.step < self.settings.steps:
            told = self.update()
            if self.every(self.settings.validate_every):
                told = told._replace(validation=self.bits_per_byte("validation"))
            yield told
            if self.skipped_in_a_row == PATIENCE:
                self.refuse_diverged(None, math.nan)
            if self.step < self.settings.steps:
                self.stop_if_asked()

    def every(self, steps: int) -> bool:
        """Whether now is one of every so many steps, or the last of all."""
        return self.step % steps == 0 or self.step == self.settings.steps

    def due(self, told: Update) -> bool:
        return self.every(self.settings.save_every)

    def stop_if_asked(self) -> None:
        """Raises Stopped where a signal reached any process."""
        if self.ranks.sum([float(bool(self.signals))])[0] > 0:
            stop_if_asked(self.signals or [signal.SIGTERM])  # none here: another process got it

    def update(self) -> Update:
        """One batch: its loss is the mean over all scored tokens of all processes.

        Where a gradient is not finite, or no token of the batch is scored, the weights stay as they are, and so do
        carried memories: they go on without what this batch said.
        """
        settings, ranks = self.settings, self.ranks
        memories = [cache.fork() for cache in self.caches]
        batches = self._batches(self.step)
        scored = ranks.sum([float(sum((batch.targets != IGNORE).sum() for batch in batches))])[0]
        rate = settings.learning_rate_at(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimiser.zero_grad(set_to_none=True)
        loss = 0.0
        for i, batch in enumerate(batches):
            with gradient_sync(self.model, enabled=i + 1 == len(batches)):
                part = self._summed_loss(batch, i) / (scored or math.nan)
                (part * ranks.count).backward()  # FSDP takes the mean over processes
            loss += part.item()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), settings.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.loss = loss = ranks.sum([loss])[0]
        if scored and norm.isfinite():
            self.optimiser.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.caches = memories
        self.step += 1
        tokens = self.step * settings.batch_size * settings.length
        return Update(self.step, loss, norm.item(), rate, tokens, self.skipped)

    def _refuse_unscored(self) -> None:
        """Raises ValueError where held-out text would be read, and none of it scored."""
        for split, windows in self.held_out.items():
            rows = min(self.settings.validation_rows, len(windows))
            if (windows.batch(0, rows).targets == IGNORE).all():
                raise ValueError(
                    f"length: expected windows with a token to be predicted in {split} text, got none in {rows} "
                    f"windows of {self.settings.length + 1} tokens of {windows.files.folder}; give a greater --length "
                    f"or --validation-rows"
                )

    def _batches(self, index: int) -> list[Batch]:
        """This process's rows of a batch, as micro-batches."""
        ranks = self.ranks
        if isinstance(self.source, Stream):
            batch = self.source.batch(index, ranks.rank, ranks.count)
        else:
            batch = self.source.batch(index, self.settings.batch_size, ranks.rank, ranks.count)
        return [part.to(ranks.device) for part in batch.split(self.micro_rows)]

    def _summed_loss(self, batch: Batch, i: int) -> Tensor:
        """In nats, over the scored tokens of the i-th micro-batch."""
        if not self.settings.carry_state:
            return self._loss(batch, use_cache=False)
        if len(self.caches) <= i:
            self.caches.append(HQLTCache())
        return self._loss(batch, past_key_values=self.caches[i].detach(), use_cache=True)

    def _loss(self, batch: Batch, **cache: Any) -> Tensor:
        """In nats, summed over scored tokens."""
        given = {"shift_labels": batch.targets, "skip_logits": True, "num_items_in_batch": 1}
        loss: Tensor = self.model(batch.inputs, resets=batch.resets, **given, **cache).loss
        return loss

    @torch.no_grad()
    def bits_per_byte(self, name: Split) -> float | None:
        """Over the split's first `validation_rows` windows, in an order that is the same for all runs.

        None: the data hold no such split. The same for any number of processes: windows are taken until each has as
        many, and those beyond the last are not scored.
        """
        if name not in self.held_out:
            return None
        files, windows, ranks = self.splits[name], self.held_out[name], self.ranks
        rows = min(self.settings.validation_rows, len(windows))
        even = -(-rows // ranks.count) * ranks.count
        mine = windows.batch(0, even, ranks.rank, ranks.count)
        beyond = torch.tensor([row >= rows for row in rows_of_rank(even, ranks.rank, ranks.count)])
        mine.targets[beyond] = IGNORE
        self.model.eval()
        total, scored = 0.0, 0.0
        for part in mine.split(self.micro_rows):
            batch = part.to(ranks.device)
            total += self._loss(batch, use_cache=False).item()
            scored += float((batch.targets != IGNORE).sum())
        total, scored = ranks.sum([total, scored])
        return total / scored / math.log(2) * len(files) / files.bytes

    # Checkpoints.

    def tensors(self) -> dict[str, Tensor]:
        return self._weights() | self._memories()

    def metadata(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def identity(self) -> dict[str, Any]:
        files = self.splits["train"]
        settings = {name: getattr(self.settings, name) for name in FIXED}
        return {"model": model_fields(self.config), "data": files.digest, **settings}

    def restore(self, place: Path, told: Mapping[str, Any]) -> None:
        step, skipped = int(told["step"]), int(told["skipped"])
        self.checkpoints.fill(place, self._weights())
        if self.settings.carry_state:
            self._begin_caches()  # with the weights loaded: FSDP keeps some of them gathered after a call
            memories = self._memories()
            self.checkpoints.fill(place, memories)
            self._take_caches(memories)
        for parameter in self.parameters.values():
            self.optimiser.state[parameter]["step"].fill_(step - skipped)
        self.step, self.skipped = step, skipped

    def _weights(self) -> dict[str, Tensor]:
        """Weights, and what the optimiser keeps of each."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"model.{name}"] = parameter.detach()
            for kept in KEPT:
                tensors[f"optimiser.{name}.{kept}"] = self.optimiser.state[parameter][kept]
        return tensors

    def _memories(self) -> dict[str, Tensor]:
        """Carried memories, [rows of all processes, …]; nothing where none are carried."""
        tensors: dict[str, Tensor] = {}
        if self.caches:
            for layer, states in enumerate(zip(*(cache.states for cache in self.caches), strict=True)):
                for part, value in MemoryState.concatenate(states).named_leaves().items():
                    tensors[f"memory.{layer}.{part}"] = self._of_all_ranks(value.detach())
        return tensors

    def _of_all_ranks(self, rows: Tensor) -> Tensor:
        mesh = self.ranks.mesh
        if mesh is None:
            return rows.contiguous()
        return DTensor.from_local(rows.contiguous(), mesh, [Shard(0)] * mesh.ndim, run_check=False)

    @torch.no_grad()
    def _begin_caches(self) -> None:
        """Memories of the right shapes, to be filled."""
        self.model.eval()
        for batch in self._batches(0):
            self.caches.append(HQLTCache())
            self.model(batch.inputs, resets=batch.resets, past_key_values=self.caches[-1], use_cache=True)

    def _take_caches(self, tensors: dict[str, Tensor]) -> None:
        """The loaded memories, each micro-batch its rows."""
        for i, cache in enumerate(self.caches):
            rows = slice(i * self.micro_rows, (i + 1) * self.micro_rows)
            cache.states = tuple(
                block.memory.state_of(local(tensors[f"memory.{n}.{name}"])[rows] for name in state.named_leaves())
                for n, (block, state) in enumerate(zip(self.model.model.layers, cache.states, strict=True))
            )

    # What is said of it.

    def title(self) -> str:
        count = self.ranks.count
        return (
            f"{self.settings.preset}: {self.size:,} parameters, {len(self.splits['train']):,} tokens, "
            f"{count} process{'es' * (count > 1)} on {self.device.type}"
        )

    def description(self) -> dict[str, Any]:
        files = self.splits["train"]
        return {
            "settings": dataclasses.asdict(self.settings),
            "model": self.config.to_diff_dict(),
            "data": {"folder": str(files.folder), "digest": files.digest, "bytes_per_token": files.bytes / len(files)},
            "processes": self.ranks.count,
        }

    def status(self, told: Update, speed: float) -> list[str]:
        """Loss, speed, share of the processors' peak, gradient, memory."""
        words = [f"loss {told.loss:.3f} nats/token", f"{speed:,.0f} tokens/s"]
        if not self._flops:
            self._flops, self._peak = flops_per_token(self.config, self.settings.length), peak_flops(self.device)
        if self._peak:
            words.append(f"{100 * speed * self._flops / (self._peak * self.ranks.count):.0f}% of peak")
        words += [f"gradient {told.gradient_norm:.2f}", f"{memory_in_use(self.device) / 2**20:,.0f} MiB"]
        if told.skipped:
            words.insert(1, f"{told.skipped} updates skipped")
        return words

    def message(self, told: Update) -> str | None:
        return None if told.validation is None else f"validation {told.validation:.4f} bits/byte"

    def refuse_diverged(self, loss: float | None, validation: float | None) -> None:
        """Raises ValueError where all updates were skipped, or the score (the loss, without one) is not finite."""
        score = loss if validation is None else validation
        if self.skipped < self.step and (score is None or math.isfinite(score)):
            return
        raise ValueError(
            f"training diverged: {self.skipped} of {self.step} updates were skipped, because their gradients were not "
            f"finite, and the loss no longer is; give a smaller --learning-rate than {self.settings.learning_rate:g} "
            f"or a longer --warmup-steps, and another --folder"
        )

    def export(self, folder: Path) -> None:
        """The model as a Hugging Face folder, whole, with its tokenizer. Raises OSError where it cannot be written."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        from transformers.utils import logging

        logging.disable_progress_bar()
        if self.ranks.mesh is None:
            weights = self.model.state_dict()
        else:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(self.model, options=options)
        if self.ranks.first:
            whole = HQLTForCausalLM(self.config)
            whole.load_state_dict({name.replace("_orig_mod.", ""): weight for name, weight in weights.items()})
            tokenizer, generation = self.splits["train"].tokenizer, cast(Any, whole.generation_config)
            if tokenizer.eos_id is not None:
                whole.config.eos_token_id = generation.eos_token_id = generation.pad_token_id = tokenizer.eos_id
            try:
                whole.save_pretrained(folder)
            except SafetensorError as error:
                raise OSError(f"{folder}: could not be written ({error}); the checkpoints are whole") from error
            tokenizer.save(folder)
        self.ranks.wait()


def refuse_unbounded(config: HQLTConfig) -> None:
    """A memory that is carried without end must not grow without end."""
    for layer, kind in enumerate(config.kinds):
        if kind != "fw" and config.layer_options(layer)["window"] is None:
            field = {"kv": "kv_window", "hybrid": "window"}[kind]
            raise ValueError(
                f"carry_state: expected a model whose KV-memory has an end, got {field} none; set model.{field}, for "
                f"one to the length of a sequence"
            )


def model_fields(config: HQLTConfig) -> dict[str, Any]:
    """The fields that a model's weights and outputs depend on, as JSON."""
    own = {name: getattr(config, name) for name in HQLTConfig.__annotations__ if name in config.to_dict()}
    return {name: value for name, value in own.items() if name not in ("use_cache", "layer_kinds")} | {
        "layer_kinds": config.kinds
    }
