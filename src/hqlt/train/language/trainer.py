"""The training loop for language models, the same for one process and for many."""

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
from hqlt.train.run import Trainer

FIXED_SETTINGS = ("length", "batch_size", "seed", "carry_state")
"""Settings that determine the position in the data; others may change when a run is resumed."""

PATIENCE = 50
"""Training stops after this many consecutive updates with gradients that are not finite."""
OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq")
"""AdamW's state tensors of each weight."""


class Update(NamedTuple):
    """Metrics after an update."""

    step: int
    """Number of updates so far, including skipped ones."""
    loss: float
    """Training loss, nats per scored token."""
    gradient_norm: float
    """Gradient norm before clipping."""
    learning_rate: float
    tokens: int
    """Training tokens so far, over all processes."""
    skipped: int
    """Updates skipped so far because a gradient was not finite or no token was scored."""
    validation: float | None = None
    """Bits per byte of the validation text; None: not measured at this step."""

    @property
    def units(self) -> int:
        return self.tokens

    def as_line(self) -> dict[str, Any]:
        return self._asdict()


class LanguageTrainer(Trainer[Update]):
    """A model, its optimizer and its position in the data.

    Checkpoints do not depend on the number of processes: batch i has the same rows for any number of ranks, and weights
    are saved unsharded.

    Raises ValueError for data that does not fit the model, and for a checkpoint of another run.
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
                f"data: expected documents of at least two tokens, as the first one is not predicted, got "
                f"{train.documents} documents of one token in {train.folder}"
            )
        present = [split for split in SPLITS if train.manifest.splits.get(split)]
        self.splits = {split: TokenFiles(data, split) for split in present}
        self.held_out = {split: Windows(self.splits[split], settings.length) for split in present if split != "train"}
        if train.vocab_size > config.vocab_size:
            raise ValueError(
                f"data: expected a vocabulary of at most {config.vocab_size} tokens, that of the model, got "
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
        fused = self.device.type == "cuda"  # one kernel for all weights instead of about ten passes
        self.optimiser = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=fused,
        )
        for parameter in self.parameters.values():  # as in AdamW's first step, so that checkpoints can be loaded
            moments = {name: torch.zeros_like(parameter) for name in OPTIMIZER_STATE}
            step = torch.zeros((), device=self.device if fused else "cpu")
            self.optimiser.state[parameter] = {"step": step, **moments}
        self.skipped, self.skipped_in_a_row = 0, 0
        self.loss: float | None = None
        """Loss of the last update; None before the first update of this process."""
        self.caches: list[HQLTCache] = []
        """The carried states of each micro-batch; empty if states are not carried."""
        self.checkpoints = DistributedCheckpoints(folder / "checkpoints", settings.keep_checkpoints, ranks)
        self._peak: float | None = None
        self._flops = 0.0

    def updates(self) -> Iterator[Update]:
        """See `Trainer`. Also raises ValueError if training diverged."""
        while self.step < self.settings.steps:
            update = self.update()
            if self.every(self.settings.validate_every):
                update = update._replace(validation=self.bits_per_byte("validation"))
            yield update
            if self.skipped_in_a_row == PATIENCE:
                self.refuse_diverged(None, math.nan)
            if self.step < self.settings.steps:
                self.stop_if_asked()

    def every(self, steps: int) -> bool:
        """Whether the current step is a multiple of `steps`, or the last one."""
        return self.step % steps == 0 or self.step == self.settings.steps

    def due(self, update: Update) -> bool:
        return self.every(self.settings.save_every)

    def stop_if_asked(self) -> None:
        """Raises Stopped if any process received a signal."""
        if self.ranks.sum([float(bool(self.signals))])[0] > 0:
            stop_if_asked(self.signals or [signal.SIGTERM])  # empty if another process received the signal

    def update(self) -> Update:
        """Train on one batch. The loss is the mean over the scored tokens of all processes.

        If a gradient is not finite or no token of the batch is scored, the update is skipped: weights and carried
        states do not change.
        """
        settings, ranks = self.settings, self.ranks
        previous = [cache.fork() for cache in self.caches]
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
                (part * ranks.count).backward()  # FSDP averages over processes
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
            self.caches = previous
        self.step += 1
        tokens = self.step * settings.batch_size * settings.length
        return Update(self.step, loss, norm.item(), rate, tokens, self.skipped)

    def _refuse_unscored(self) -> None:
        """Raises ValueError if no token of the held-out windows would be scored."""
        for split, windows in self.held_out.items():
            rows = min(self.settings.validation_rows, len(windows))
            if (windows.batch(0, rows).targets == IGNORE).all():
                raise ValueError(
                    f"length: expected windows with at least one token to predict in the {split} split, got none in "
                    f"{rows} windows of {self.settings.length + 1} tokens of {windows.files.folder}; give a greater "
                    f"--length or --validation-rows"
                )

    def _batches(self, index: int) -> list[Batch]:
        """This process's rows of a batch, split into micro-batches."""
        ranks = self.ranks
        if isinstance(self.source, Stream):
            batch = self.source.batch(index, ranks.rank, ranks.count)
        else:
            batch = self.source.batch(index, self.settings.batch_size, ranks.rank, ranks.count)
        return [part.to(ranks.device) for part in batch.split(self.micro_rows)]

    def _summed_loss(self, batch: Batch, i: int) -> Tensor:
        """Summed loss of the scored tokens of the i-th micro-batch, in nats."""
        if not self.settings.carry_state:
            return self._loss(batch, use_cache=False)
        if len(self.caches) <= i:
            self.caches.append(HQLTCache())
        return self._loss(batch, past_key_values=self.caches[i].detach(), use_cache=True)

    def _loss(self, batch: Batch, **cache: Any) -> Tensor:
        """Summed loss of the scored tokens, in nats."""
        options = {"shift_labels": batch.targets, "skip_logits": True, "num_items_in_batch": 1}
        loss: Tensor = self.model(batch.inputs, resets=batch.resets, **options, **cache).loss
        return loss

    @torch.no_grad()
    def bits_per_byte(self, name: Split) -> float | None:
        """Bits per byte on the first `validation_rows` windows of a split, in an order that is the same for all runs.

        None: the data has no such split. The result does not depend on the number of processes: if the windows do not
        divide evenly, additional windows are read but not scored.
        """
        if name not in self.held_out:
            return None
        files, windows, ranks = self.splits[name], self.held_out[name], self.ranks
        rows = min(self.settings.validation_rows, len(windows))
        padded = -(-rows // ranks.count) * ranks.count
        own = windows.batch(0, padded, ranks.rank, ranks.count)
        unscored = torch.tensor([row >= rows for row in rows_of_rank(padded, ranks.rank, ranks.count)])
        own.targets[unscored] = IGNORE
        self.model.eval()
        total, scored = 0.0, 0.0
        for part in own.split(self.micro_rows):
            batch = part.to(ranks.device)
            total += self._loss(batch, use_cache=False).item()
            scored += float((batch.targets != IGNORE).sum())
        total, scored = ranks.sum([total, scored])
        return total / scored / math.log(2) * len(files) / files.bytes

    # Checkpoints.

    def tensors(self) -> dict[str, Tensor]:
        return self._weights() | self._states()

    def metadata(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def identity(self) -> dict[str, Any]:
        files = self.splits["train"]
        settings = {name: getattr(self.settings, name) for name in FIXED_SETTINGS}
        return {"model": model_fields(self.config), "data": files.digest, **settings}

    def restore(self, place: Path, metadata: Mapping[str, Any]) -> None:
        step, skipped = int(metadata["step"]), int(metadata["skipped"])
        self.checkpoints.load_into(place, self._weights())
        if self.settings.carry_state:
            self._init_caches()  # after loading the weights: FSDP keeps some of them gathered after a call
            states = self._states()
            self.checkpoints.load_into(place, states)
            self._set_caches(states)
        for parameter in self.parameters.values():
            self.optimiser.state[parameter]["step"].fill_(step - skipped)
        self.step, self.skipped = step, skipped

    def _weights(self) -> dict[str, Tensor]:
        """The weights, and the optimizer state of each one."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"model.{name}"] = parameter.detach()
            for moment in OPTIMIZER_STATE:
                tensors[f"optimiser.{name}.{moment}"] = self.optimiser.state[parameter][moment]
        return tensors

    def _states(self) -> dict[str, Tensor]:
        """The carried states, [rows of all processes, …]; empty if states are not carried."""
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
    def _init_caches(self) -> None:
        """Create caches of the right shapes."""
        self.model.eval()
        for batch in self._batches(0):
            self.caches.append(HQLTCache())
            self.model(batch.inputs, resets=batch.resets, past_key_values=self.caches[-1], use_cache=True)

    def _set_caches(self, tensors: dict[str, Tensor]) -> None:
        """Distribute the loaded states to the caches of the micro-batches."""
        for i, cache in enumerate(self.caches):
            rows = slice(i * self.micro_rows, (i + 1) * self.micro_rows)
            cache.states = tuple(
                block.memory.state_of(local(tensors[f"memory.{n}.{name}"])[rows] for name in state.named_leaves())
                for n, (block, state) in enumerate(zip(self.model.model.layers, cache.states, strict=True))
            )

    # Reporting.

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

    def status(self, update: Update, speed: float) -> list[str]:
        """Loss, speed, share of peak performance, gradient norm, memory."""
        values = [f"loss {update.loss:.3f} nats/token", f"{speed:,.0f} tokens/s"]
        if not self._flops:
            self._flops, self._peak = flops_per_token(self.config, self.settings.length), peak_flops(self.device)
        if self._peak:
            values.append(f"{100 * speed * self._flops / (self._peak * self.ranks.count):.0f}% of peak")
        values += [f"gradient {update.gradient_norm:.2f}", f"{memory_in_use(self.device) / 2**20:,.0f} MiB"]
        if update.skipped:
            values.insert(1, f"{update.skipped} updates skipped")
        return values

    def message(self, update: Update) -> str | None:
        return None if update.validation is None else f"validation {update.validation:.4f} bits/byte"

    def refuse_diverged(self, loss: float | None, validation: float | None) -> None:
        """Raises ValueError if all updates were skipped, or the validation score (or else the loss) is not finite."""
        score = loss if validation is None else validation
        if self.skipped < self.step and (score is None or math.isfinite(score)):
            return
        raise ValueError(
            f"training diverged: {self.skipped} of {self.step} updates were skipped because their gradients were not "
            f"finite, and the loss is not finite either; give a --learning-rate below {self.settings.learning_rate:g} "
            f"or more --warmup-steps, and another --folder"
        )

    def export(self, folder: Path) -> None:
        """Save model and tokenizer as a Hugging Face folder. Raises OSError if it cannot be written."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        from transformers.utils import logging

        logging.disable_progress_bar()
        if self.ranks.mesh is None:
            weights = self.model.state_dict()
        else:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(self.model, options=options)
        if self.ranks.first:
            unsharded = HQLTForCausalLM(self.config)
            unsharded.load_state_dict({name.replace("_orig_mod.", ""): weight for name, weight in weights.items()})
            tokenizer, generation = self.splits["train"].tokenizer, cast(Any, unsharded.generation_config)
            if tokenizer.eos_id is not None:
                unsharded.config.eos_token_id = generation.eos_token_id = generation.pad_token_id = tokenizer.eos_id
            try:
                unsharded.save_pretrained(folder)
            except SafetensorError as error:
                raise OSError(f"{folder}: could not be written ({error}); the checkpoints are intact") from error
            tokenizer.save(folder)
        self.ranks.wait()


def refuse_unbounded(config: HQLTConfig) -> None:
    """Raises ValueError if the carried state would grow without limit."""
    for layer, kind in enumerate(config.kinds):
        if kind != "fw" and config.layer_options(layer)["window"] is None:
            field = {"kv": "kv_window", "hybrid": "window"}[kind]
            raise ValueError(
                f"carry_state: expected a model whose KV-memory is bounded, got no {field}; set model.{field}, for "
                f"example to the length of a sequence"
            )


def model_fields(config: HQLTConfig) -> dict[str, Any]:
    """The config fields that the weights and outputs of a model depend on, as JSON."""
    own = {name: getattr(config, name) for name in HQLTConfig.__annotations__ if name in config.to_dict()}
    return {name: value for name, value in own.items() if name not in ("use_cache", "layer_kinds")} | {
        "layer_kinds": config.kinds
    }
