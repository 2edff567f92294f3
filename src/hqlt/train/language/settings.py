"""Settings of a training run: model, data, optimizer and parallelizm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hqlt.ranges import COUNT, FRACTION, NON_NEGATIVE, POSITIVE, SEED, Range, check_ranges
from hqlt.train.schedule import warmup_then_cosine


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of `hqlt train`. The defaults train the smallest preset within minutes on a laptop."""

    preset: str = "tiny"
    """Name of the model, such as hqlt-340m or deltanet-1.3b (see `hqlt.preset`)."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of HQLTConfig that override the preset, such as --model.window=128."""
    data: str = "python-library"
    """A text file, whose last tenth is held out for validation; a folder written by `hqlt data prepare`; or
    python-library. Text that is not prepared yet is tokenized as bytes."""
    length: int = 256
    """Tokens per sequence."""
    batch_size: int = 16
    """Sequences per update, over all processes."""
    micro_batch_size: int | None = None
    """Sequences per forward pass of a process, to save memory; null: all of its sequences."""
    steps: int = 600
    """Number of optimizer updates."""
    carry_state: bool = False
    """Truncated backpropagation through time: rows read contiguous text, and the state is carried between batches."""

    learning_rate: float = 3e-3
    """Peak learning rate; the schedule is linear warmup, then cosine decay."""
    warmup_steps: int | None = None
    """Warmup length in updates; null: 60, or a tenth of the steps if that is less."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak."""
    weight_decay: float = 0.1
    """AdamW weight decay of linear layers; norms, convolutions and embeddings are not decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    eps: float = 1e-8
    """AdamW epsilon."""
    max_grad_norm: float = 1.0
    """Maximum gradient norm; larger gradients are scaled down."""
    seed: int = 0
    """Seed of the initial weights and of the data order."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; stored weights and their gradients are float32."""
    activation_checkpointing: bool = False
    """Whether blocks save only their input and recompute activations in the backward pass."""
    compile: bool = False
    """Whether blocks are compiled with torch.compile."""
    shard_over: int | None = None
    """Number of processes that share one copy of the weights; null: all. Fewer than all: hybrid sharding."""

    save_every: int = 200
    """Updates between checkpoints; one is always saved at the end."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep; older ones are removed."""
    validate_every: int = 100
    """Updates between validations; there is always one at the end."""
    validation_rows: int = 64
    """Number of validation sequences; the same number is used for the test at the end."""

    def __post_init__(self) -> None:
        check_ranges(self, length=COUNT, batch_size=COUNT, steps=COUNT, micro_batch_size=COUNT, shard_over=COUNT)
        check_ranges(
            self, save_every=COUNT, keep_checkpoints=COUNT, validate_every=COUNT, validation_rows=COUNT, seed=SEED
        )
        check_ranges(self, learning_rate=POSITIVE, eps=POSITIVE, max_grad_norm=POSITIVE, weight_decay=NON_NEGATIVE)
        check_ranges(self, min_lr_ratio=FRACTION, warmup_steps=Range(0, self.steps, whole=True))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers from 0 to below 1, got {self.betas}")

    @property
    def num_warmup_steps(self) -> int:
        """Warmup length in updates, with the default resolved."""
        return min(60, self.steps // 10) if self.warmup_steps is None else self.warmup_steps

    def learning_rate_at(self, step: int) -> float:
        """The learning rate at a step, counted from 0."""
        share = warmup_then_cosine(
            step, warmup_steps=self.num_warmup_steps, steps=self.steps, min_ratio=self.min_lr_ratio
        )
        return self.learning_rate * share

    def micro_batches(self, ranks: int) -> tuple[int, int]:
        """The number of micro-batches per process and update, and the rows of each.

        Raises ValueError if the batch does not divide evenly.
        """
        if self.batch_size % ranks:
            raise ValueError(f"batch_size: expected a multiple of the {ranks} processes, got {self.batch_size}")
        own = self.batch_size // ranks
        rows = self.micro_batch_size or own
        if own % rows:
            raise ValueError(
                f"micro_batch_size: expected a divisor of {own}, the number of rows per process (batch size "
                f"{self.batch_size}, {ranks} processes), got {rows}"
            )
        return own // rows, rows
