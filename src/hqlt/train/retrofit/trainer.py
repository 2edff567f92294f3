"""The trainer of a retrofit, which runs its stages in order."""

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
from hqlt.train.retrofit.layers import LayerChoice
from hqlt.train.retrofit.lora import IN_LORA, Lora
from hqlt.train.retrofit.losses import beyond, divergence, layer_errors, micro_batches, next_token
from hqlt.train.retrofit.settings import STAGES, RetrofitSettings, Stage
from hqlt.train.run import Trainer

MAY_CHANGE = (
    "data",
    "keep_checkpoints",
    "save_every",
    "micro_batch_size",
    "activation_checkpointing",
    "full",
    "full_choice",
)
"""Settings that may change when a run is resumed. The identity of a run contains the data and the layers themselves."""
MIN_VALIDATION_LENGTH = 2 * (KEY + VALUE) * len(DEPTHS)
"""Length of a text, in tokens, that has room for the facts of the probes."""
FEATURE_MAP, FEATURE_MAP_RATE = ".feature_map.", 5.0
"""Part of the names of feature maps, and the factor of their learning rate. It is large because they are initialized as
the identity, far from their optimum."""
BETAS = 0.9, 0.95
"""β of AdamW."""


class Update(NamedTuple):
    """Metrics of one update."""

    step: int
    """Number of updates in all stages, including skipped ones."""
    stage: str
    loss: float
    """fit: mean relative squared error of the layers; distill: KL, tune: cross-entropy, both in nats per scored
    token."""
    gradient_norm: float
    """Before clipping; fit: of all layers together."""
    learning_rate: float
    tokens: int
    """Tokens read since the run began."""
    skipped: int
    """Number of updates skipped so far, because a gradient was not finite or no token was scored."""
    layers: dict[int, float]
    """fit: the error of each layer."""
    scores: dict[str, float] | None = None
    """At the end of a stage: kl and nats on held-out text."""

    @property
    def units(self) -> int:
        """Tokens read since the run began, from which the speed is computed."""
        return self.tokens

    def as_line(self) -> dict[str, Any]:
        """The metrics as a flat dict, for metrics.jsonl and trackers."""
        line = self._asdict()
        layers, scores = line.pop("layers"), line.pop("scores") or {}
        line["stage"] = STAGES.index(self.stage) + 1
        return line | {f"layer_{layer}": error for layer, error in layers.items()} | scores


class RetrofitTrainer(Trainer[Update]):
    """Trains a retrofitted model, the student. It shares all frozen weights with the original, the teacher.

    Args:
        settings: what to train.
        teacher: the original model in float32, on the device to train on.
        source: digest of its weights.
        choice: which layers keep full attention.
        data: folder of tokens.
        folder: folder of the run.

    Raises:
        ValueError: when the documents are too short.
    """

    kind, unit = "retrofit", "tokens"
    step = 0

    def __init__(
        self,
        settings: RetrofitSettings,
        teacher: HQLTForCausalLM,
        source: str,
        choice: LayerChoice,
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
        """Name of the current stage."""
        self.lora: Lora | None = None
        self.optimiser: torch.optim.Optimizer
        self.skipped, self.skipped_in_a_row = 0, 0
        self.extra_state = {"scores": {}}

    # Training.

    def updates(self) -> Iterator[Update]:
        """Train, and yield the metrics of each update. Raises ValueError when training diverges."""
        scores = self.extra_state["scores"]
        if self.step == 0 and "start" not in scores:
            scores |= {"original": self.score(self.teacher), "start": self.score(self.student)}
            stop_if_asked(self.signals)
        while self.step < self.settings.steps:
            name, stage, first = self.stage_at(self.step)
            if name != self.stage:
                self.begin(name)
            update = self.update(name, stage, self.step - first)
            if self.step == first + stage.steps:
                scores[name] = self.score(self.student)
                update = update._replace(scores=scores[name])
            yield update
            if self.skipped_in_a_row == PATIENCE:
                self.refuse_diverged()
            if self.step < self.settings.steps:
                stop_if_asked(self.signals)

    def refuse_diverged(self) -> None:
        """Raise ValueError if the last updates were skipped."""
        if self.skipped_in_a_row:
            raise ValueError(
                f"training diverged: the last {self.skipped_in_a_row} updates were skipped, because their gradients "
                f"were not finite; use smaller learning rates and a new folder"
            )

    def due(self, update: Update) -> bool:
        """Whether to save a checkpoint after this update."""
        return self.step % self.settings.save_every == 0 or update.scores is not None

    def stage_at(self, step: int) -> tuple[str, Stage, int]:
        """The stage of a step, and its first step."""
        first = 0
        for name, stage in self.settings.stages:
            if step < first + stage.steps:
                return name, stage, first
            first += stage.steps
        raise AssertionError("step is after the last stage")

    def begin(self, name: str) -> None:
        """Begin a stage: add its parameters, and create its optimizer."""
        settings, self.stage = self.settings, name
        torch.manual_seed(settings.seed + 1)
        if name != "fit" and settings.lora_rank and self.lora is None:
            self.lora = Lora(self.student, settings.lora_rank)
        by_peak: dict[float, list[Tensor]] = {}
        for part, parameter in self.trained().items():
            own = getattr(settings, name).learning_rate * (FEATURE_MAP_RATE if FEATURE_MAP in part else 1)
            by_peak.setdefault(settings.lora_learning_rate if IN_LORA in part else own, []).append(parameter)
        groups = [{"params": parameters, "peak": peak} for peak, parameters in by_peak.items()]
        self.optimiser = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=0.0)

    def trained(self) -> dict[str, Tensor]:
        """The trained parameters, by name."""
        return {name: parameter for name, parameter in self.student.named_parameters() if parameter.requires_grad}

    def update(self, name: str, stage: Stage, index: int) -> Update:
        """Train on batch `index` of a stage. Skipped if a gradient is not finite or no token is scored."""
        settings = self.settings
        batch = self.windows[name].batch(index, stage.batch_size).to(self.device)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * stage.share_at(index)
        self.student.train()
        self.optimiser.zero_grad(set_to_none=True)
        loss, layers = 0.0, dict.fromkeys(self.choice.changed, 0.0) if name == "fit" else {}
        parts = list(micro_batches(batch, settings.micro_batch_size, settings.visible))
        for part, scored, share in parts:
            if name == "fit":
                with self.autocast():
                    errors = layer_errors(self.teacher, self.student, part, scored, list(layers), share)
                layers = {layer: error + share * errors[layer] for layer, error in layers.items()}
            else:
                with self.autocast():
                    part_loss = self.summed_loss(name, part, scored) * share / int(scored.sum())
                part_loss.backward()
                loss += part_loss.item()
        if layers:
            loss = sum(layers.values()) / len(layers)
        norm = self.clip_gradients(name)
        if parts and norm.isfinite():
            self.optimiser.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.step += 1
        rate = stage.learning_rate * stage.share_at(index)
        return Update(self.step, name, loss, norm.item(), rate, self.tokens(), self.skipped, layers)

    def summed_loss(self, name: str, batch: Batch, scored: Tensor) -> Tensor:
        """The loss of stage "distill" or "tune", summed over scored tokens."""
        if name == "distill":
            return divergence(self.teacher, self.student, batch, scored)
        return next_token(self.student, batch, scored)

    def clip_gradients(self, name: str) -> Tensor:
        """Clip the gradients; returns their norm before. In stage 1 each layer is clipped by itself."""
        groups: list[Any] = [self.student.parameters()]
        if name == "fit":
            groups = [block.parameters() for block in self.student.model.layers]
        norms = [nn.utils.clip_grad_norm_(group, self.settings.max_grad_norm) for group in groups]
        return torch.stack(norms).norm()

    def tokens(self) -> int:
        """Number of tokens in all updates so far."""
        total, left = 0, self.step
        for _, stage in self.settings.stages:
            total += min(left, stage.steps) * stage.batch_size * stage.length
            left -= min(left, stage.steps)
        return total

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to bfloat16 if the settings ask for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    # Scores.

    @torch.no_grad()
    def score(self, model: HQLTForCausalLM) -> dict[str, float]:
        """KL(original ‖ model), "kl", and cross-entropy, "nats", both per held-out token beyond window and sinks."""
        if self.held_out is None:
            return {}
        kl, nats = 0.0, 0.0
        model.eval()
        for part, scored, share in micro_batches(self.held_out, self.settings.micro_batch_size, self.settings.visible):
            share /= int(scored.sum())
            with self.autocast():
                kl += share * divergence(self.teacher, model, part, scored).item()
                nats += share * next_token(model, part, scored).item()
        return {"kl": kl, "nats": nats}

    def _held_out(self) -> Batch | None:
        """Validation texts, long enough for the probes, or None."""
        if "validation" not in self.splits or not self.settings.validation_rows:
            return None
        windows = Windows(self.splits["validation"], max(self.settings.distill.length, MIN_VALIDATION_LENGTH))
        return windows.batch(0, min(self.settings.validation_rows, len(windows))).to(self.device)

    def _refuse_unscored(self) -> None:
        """Raise ValueError if no text is longer than window + sinks."""
        for name, stage in self.settings.stages:
            first = self.windows[name].batch(0, min(64, len(self.windows[name])))
            if not beyond(first, self.settings.visible).any():
                raise ValueError(
                    f"data: expected documents of more than window + sinks = {self.settings.visible} tokens, because "
                    f"only tokens beyond them are trained on, got none in {len(first.inputs)} windows of "
                    f"{stage.length} tokens of {self.splits['train'].folder}; use a smaller --window"
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
        settings = {name: value for name, value in dataclasses.asdict(self.settings).items() if name not in MAY_CHANGE}
        data = self.splits["train"].digest
        return {"source": self.source, "model": model_fields(self.choice.config), "data": data, **settings}

    def restore(self, place: Path, metadata: Mapping[str, Any]) -> None:
        tensors = self.checkpoints.load(place)
        self.step, self.skipped = int(metadata["step"]), int(metadata["skipped"])
        if metadata["stage"]:
            self.begin(metadata["stage"])
        for name, parameter in self.trained().items():
            with torch.no_grad():
                parameter.copy_(tensors.pop(f"model.{name}"))
            prefix = f"optimiser.{name}."
            kept = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if kept:
                self.optimiser.state[parameter] = {
                    key: value if key == "step" else value.to(self.device) for key, value in kept.items()
                }

    # Reports.

    def title(self) -> str:
        new = sum(parameter.numel() for parameter in self.student.parameters() if parameter.requires_grad)
        full, layers = self.choice.full, len(self.student.model.layers)
        which = f" ({', '.join(map(str, full))})" if full else ""
        return (
            f"{self.size:,} parameters, {new:,} of them new; {len(full)} of {layers} layers keep full attention"
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

    def status(self, update: Update, speed: float) -> list[str]:
        name = {"fit": "relative error", "distill": "KL"}.get(update.stage, "loss")
        words = [f"stage {STAGES.index(update.stage) + 1}", f"{name} {update.loss:.4f}", f"{speed:,.0f} tokens/s"]
        if update.skipped:
            words.append(f"{update.skipped} updates skipped")
        return [*words, f"gradient {update.gradient_norm:.2f}", f"{memory_in_use(self.device) / 2**20:,.0f} MiB"]

    def message(self, update: Update) -> str | None:
        scores = self.extra_state["scores"]
        messages = [f"untrained: {formatted(scores['start'])}"] if update.step == 1 and scores["start"] else []
        if update.scores:
            messages.append(f"stage {STAGES.index(update.stage) + 1} done: {formatted(update.scores)}")
        return "; ".join(messages) or None


def formatted(scores: dict[str, float]) -> str:
    """The scores as text."""
    return f"KL from the original {scores['kl']:.4f} nats, perplexity {math.exp(scores['nats']):.2f} beyond the window"
