"""The stages of a retrofit, one after the other: what each trains, and on what."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hqlt.data import TokenFiles, Windows
from hqlt.evaluate.probes import DEPTHS, KEY, VALUE
from hqlt.model import HQLTForCausalLM
from hqlt.model.pretrained.retrofit import retrofitted
from hqlt.signals import stop_if_asked
from hqlt.task.task import SPLITS, Batch
from hqlt.train.checkpoints import Checkpoints
from hqlt.train.language.ranks import enable_activation_checkpointing
from hqlt.train.language.trainer import PATIENCE, model_fields
from hqlt.train.live import memory_in_use
from hqlt.train.retrofit.layers import Choice
from hqlt.train.retrofit.lora import IN_LORA, Lora
from hqlt.train.retrofit.losses import beyond, divergence, layer_errors, micro_batches, next_token
from hqlt.train.retrofit.settings import STAGES, RetrofitSettings, Stage
from hqlt.train.run import Trainer

FREE = ("data", "keep_checkpoints", "save_every", "micro_batch_size", "activation_checkpointing", "full", "full_choice")
"""Settings that may change when a run is resumed: the data and the layers are in the identity themselves."""
LEAST = 2 * (KEY + VALUE) * len(DEPTHS)
"""Tokens of a text that has room for the probes' facts."""
IN_MAP, MAPS = ".feature_map.", 5.0
"""Stands in the names of feature maps, and how much greater their learning rate is: they begin as the identity, and
have far to go."""
BETAS = 0.9, 0.95
"""AdamW's."""


class Update(NamedTuple):
    """What is told after an update."""

    step: int
    """Updates of all stages, skipped ones included."""
    stage: str
    loss: float
    """fit: the relative squared error, mean over layers; distill: KL, tune: cross-entropy, in nats per scored token."""
    gradient_norm: float
    """Before clipping; fit: of all layers together."""
    learning_rate: float
    tokens: int
    """Seen since the run began."""
    skipped: int
    """Updates skipped so far, because a gradient was not finite or no token was scored."""
    layers: dict[int, float]
    """fit: the error of each layer."""
    scores: dict[str, float] | None = None
    """Of held-out text, at the end of a stage: kl, nats."""

    @property
    def units(self) -> int:
        return self.tokens

    def as_line(self) -> dict[str, Any]:
        """Flat, for metrics.jsonl and trackers."""
        told = self._asdict()
        layers, scores = told.pop("layers"), told.pop("scores") or {}
        told["stage"] = STAGES.index(self.stage) + 1
        return told | {f"layer_{layer}": error for layer, error in layers.items()} | scores


class RetrofitTrainer(Trainer[Update]):
    """The original and the model that it becomes: they share all weights that are not trained.

    teacher: in float32, on its device. source: names its weights. Raises ValueError for data that do not suit it.
    """

    kind, unit = "retrofit", "tokens"
    step = 0

    def __init__(
        self,
        settings: RetrofitSettings,
        teacher: HQLTForCausalLM,
        source: str,
        choice: Choice,
        data: Path,
        folder: Path,
    ) -> None:
        self.settings, self.teacher, self.source, self.choice = settings, teacher, source, choice
        self.device = teacher.device
        train = TokenFiles(data, "train")
        self.splits = {split: TokenFiles(data, split) for split in SPLITS if train.manifest.splits.get(split)}
        self.windows = {
            name: Windows(train, stage.length, settings.seed * len(STAGES) + STAGES.index(name))
            for name, stage in settings.stages
        }
        self._refuse_unscored()
        self.held_out = self._held_out()
        torch.manual_seed(settings.seed)
        self.student = retrofitted(teacher.requires_grad_(False), choice.config)
        if settings.activation_checkpointing:
            enable_activation_checkpointing(self.student)
        self.size = sum(parameter.numel() for parameter in self.student.parameters())
        self.checkpoints = Checkpoints(folder / "checkpoints", settings.keep_checkpoints)
        self.stage = ""
        """The name of the one that is under way."""
        self.lora: Lora | None = None
        self.optimiser: torch.optim.Optimizer
        self.skipped, self.skipped_in_a_row = 0, 0
        self.extra_state = {"scores": {}}

    # Training.

    def updates(self) -> Iterator[Update]:
        """Raises ValueError too, once training diverged."""
        scores = self.extra_state["scores"]
        if self.step == 0 and "start" not in scores:
            scores |= {"original": self.score(self.teacher), "start": self.score(self.student)}
            stop_if_asked(self.signals)
        while self.step < self.settings.steps:
            name, stage, first = self.stage_at(self.step)
            if name != self.stage:
                self.begin(name)
            told = self.update(name, stage, self.step - first)
            if self.step == first + stage.steps:
                scores[name] = self.score(self.student)
                told = told._replace(scores=scores[name])
            yield told
            if self.skipped_in_a_row == PATIENCE:
                self.refuse_diverged()
            if self.step < self.settings.steps:
                stop_if_asked(self.signals)

    def refuse_diverged(self) -> None:
        """Raises ValueError where the last updates were skipped."""
        if self.skipped_in_a_row:
            raise ValueError(
                f"training diverged: the last {self.skipped_in_a_row} updates were skipped, because their gradients "
                f"were not finite; give smaller learning rates, and another folder"
            )

    def due(self, told: Update) -> bool:
        return self.step % self.settings.save_every == 0 or told.scores is not None

    def stage_at(self, step: int) -> tuple[str, Stage, int]:
        """The stage of a step, and the step that it begins with."""
        first = 0
        for name, stage in self.settings.stages:
            if step < first + stage.steps:
                return name, stage, first
            first += stage.steps
        raise AssertionError("there are fewer steps")

    def begin(self, name: str) -> None:
        """A stage's parameters, and its optimiser, which has seen nothing yet."""
        settings, self.stage = self.settings, name
        torch.manual_seed(settings.seed + 1)
        if name != "fit" and settings.lora_rank and self.lora is None:
            self.lora = Lora(self.student, settings.lora_rank)
        by_peak: dict[float, list[Tensor]] = {}
        for part, parameter in self.trained().items():
            own = getattr(settings, name).learning_rate * (MAPS if IN_MAP in part else 1)
            by_peak.setdefault(settings.lora_learning_rate if IN_LORA in part else own, []).append(parameter)
        groups = [{"params": parameters, "peak": peak} for peak, parameters in by_peak.items()]
        self.optimiser = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=0.0)

    def trained(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self.student.named_parameters() if parameter.requires_grad}

    def update(self, name: str, stage: Stage, index: int) -> Update:
        """One batch of a stage, its index-th. Where a gradient is not finite, or nothing is scored, nothing changes."""
        settings, reach = self.settings, self.settings.reach
        batch = self.windows[name].batch(index, stage.batch_size).to(self.device)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * stage.share_at(index)
        self.student.train()
        self.optimiser.zero_grad(set_to_none=True)
        loss, layers = 0.0, dict.fromkeys(self.choice.changed, 0.0) if name == "fit" else {}
        parts = list(micro_batches(batch, settings.micro_batch_size, reach))
        for part, scored, share in parts:
            if name == "fit":
                with self.autocast():
                    errors = layer_errors(self.teacher, self.student, part, scored, list(layers), share)
                layers = {layer: error + share * errors[layer] for layer, error in layers.items()}
            else:
                with self.autocast():
                    summed = self.summed(name, part, scored) * share / int(scored.sum())
                summed.backward()
                loss += summed.item()
        if layers:
            loss = sum(layers.values()) / len(layers)
        norm = self.clip(name)
        if parts and norm.isfinite():
            self.optimiser.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.step += 1
        rate = stage.learning_rate * stage.share_at(index)
        return Update(self.step, name, loss, norm.item(), rate, self.tokens(), self.skipped, layers)

    def summed(self, name: str, batch: Batch, scored: Tensor) -> Tensor:
        if name == "distill":
            return divergence(self.teacher, self.student, batch, scored)
        return next_token(self.student, batch, scored)

    def clip(self, name: str) -> Tensor:
        """The gradient's norm. In stage 1 each layer has a loss of its own, and is clipped by itself."""
        groups: list[Any] = [self.student.parameters()]
        if name == "fit":
            groups = [block.parameters() for block in self.student.model.layers]
        norms = [nn.utils.clip_grad_norm_(group, self.settings.max_grad_norm) for group in groups]
        return torch.stack(norms).norm()

    def tokens(self) -> int:
        """Of all updates so far."""
        total, left = 0, self.step
        for _, stage in self.settings.stages:
            total += min(left, stage.steps) * stage.batch_size * stage.length
            left -= min(left, stage.steps)
        return total

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    # Scores.

    @torch.no_grad()
    def score(self, model: HQLTForCausalLM) -> dict[str, float]:
        """On held-out tokens beyond window and sinks: kl, KL(original ‖ model), and nats, both per token."""
        if self.held_out is None:
            return {}
        kl, nats = 0.0, 0.0
        model.eval()
        for part, scored, share in micro_batches(self.held_out, self.settings.micro_batch_size, self.settings.reach):
            share /= int(scored.sum())
            with self.autocast():
                kl += share * divergence(self.teacher, model, part, scored).item()
                nats += share * next_token(model, part, scored).item()
        return {"kl": kl, "nats": nats}

    def _held_out(self) -> Batch | None:
        """Texts that are scored, long enough for the probes; None: there are none."""
        if "validation" not in self.splits or not self.settings.validation_rows:
            return None
        windows = Windows(self.splits["validation"], max(self.settings.distill.length, LEAST))
        return windows.batch(0, min(self.settings.validation_rows, len(windows))).to(self.device)

    def _refuse_unscored(self) -> None:
        """Raises ValueError where texts are too short for anything to lie beyond the window."""
        for name, stage in self.settings.stages:
            first = self.windows[name].batch(0, min(64, len(self.windows[name])))
            if not beyond(first, self.settings.reach).any():
                raise ValueError(
                    f"data: expected documents of more than window + sinks = {self.settings.reach} tokens, beyond "
                    f"which there is something to be learned, got none in {len(first.inputs)} windows of "
                    f"{stage.length} tokens of {self.splits['train'].folder}; give a smaller --window"
                )

    # Checkpoints.

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trained().items():
            tensors[f"model.{name}"] = parameter.detach()
            if self.stage:
                kept = self.optimiser.state[parameter].items()
                tensors |= {f"optimiser.{name}.{key}": value for key, value in kept}
        return tensors

    def metadata(self) -> dict[str, Any]:
        return {"stage": self.stage, "skipped": self.skipped}

    def identity(self) -> dict[str, Any]:
        settings = {name: value for name, value in dataclasses.asdict(self.settings).items() if name not in FREE}
        data = self.splits["train"].digest
        return {"source": self.source, "model": model_fields(self.choice.config), "data": data, **settings}

    def restore(self, place: Path, told: Mapping[str, Any]) -> None:
        tensors = self.checkpoints.load(place)
        self.step, self.skipped = int(told["step"]), int(told["skipped"])
        if told["stage"]:
            self.begin(told["stage"])
        for name, parameter in self.trained().items():
            with torch.no_grad():
                parameter.copy_(tensors.pop(f"model.{name}"))
            prefix = f"optimiser.{name}."
            kept = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if kept:
                self.optimiser.state[parameter] = {
                    key: value if key == "step" else value.to(self.device) for key, value in kept.items()
                }

    # What is said of it.

    def title(self) -> str:
        new = sum(parameter.numel() for parameter in self.student.parameters() if parameter.requires_grad)
        full, layers = self.choice.full, len(self.student.model.layers)
        which = f" ({', '.join(map(str, full))})" if full else ""
        return (
            f"{self.size:,} parameters, {new:,} of them new; {len(full)} of {layers} layers stay full attention"
            f"{which}; {len(self.splits['train']):,} tokens, on {self.device.type}"
        )

    def description(self) -> dict[str, Any]:
        files = self.splits["train"]
        return {
            "settings": dataclasses.asdict(self.settings),
            "model": self.choice.config.to_diff_dict(),
            "layers": self.choice.as_json(),
            "data": {"folder": str(files.folder), "digest": files.digest, "bytes_per_token": files.bytes / len(files)},
        }

    def status(self, told: Update, speed: float) -> list[str]:
        number, unit = STAGES.index(told.stage) + 1, {"fit": "relative error", "distill": "KL"}.get(told.stage, "loss")
        words = [f"stage {number}", f"{unit} {told.loss:.4f}", f"{speed:,.0f} tokens/s"]
        if told.skipped:
            words.append(f"{told.skipped} updates skipped")
        return [*words, f"gradient {told.gradient_norm:.2f}", f"{memory_in_use(self.device) / 2**20:,.0f} MiB"]

    def message(self, told: Update) -> str | None:
        scores = self.extra_state["scores"]
        news = [f"untrained: {said(scores['start'])}"] if told.step == 1 and scores["start"] else []
        if told.scores:
            news.append(f"stage {STAGES.index(told.stage) + 1} done: {said(told.scores)}")
        return "; ".join(news) or None


def said(scores: dict[str, float]) -> str:
    return f"{scores['kl']:.4f} nats from the original, perplexity {math.exp(scores['nats']):.2f} beyond the window"
