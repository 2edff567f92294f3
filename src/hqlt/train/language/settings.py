"""What a training run is: a model, data, an optimiser and how it is spread over processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hqlt.ranges import COUNT, FRACTION, NON_NEGATIVE, POSITIVE, SEED, Range, check_ranges
from hqlt.train.schedule import warmup_then_cosine


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The defaults train the smallest preset on the standard library's source, in minutes on a laptop."""

    preset: str = "tiny"
    """The model: hqlt-340m, deltanet-1.3b … (see `hqlt.preset`)."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of HQLTConfig that differ from the preset: --model.window=128."""
    data: str = "python-library"
    """A text file, whose last tenth is held out for validation; a folder that `hqlt data prepare` wrote; or
    python-library. What is not prepared yet is prepared, as bytes."""
    length: int = 256
    """Tokens in a sequence."""
    batch_size: int = 16
    """Sequences in an update, over all processes."""
    micro_batch_size: int | None = None
    """Sequences that a process takes at once, to save memory; null: all of its own."""
    steps: int = 600
    """Updates."""
    carry_state: bool = False
    """Truncated back-propagation through time: rows read contiguous text, and the memory goes on between batches."""

    learning_rate: float = 3e-3
    """Peak of the schedule: linear warm-up, then a cosine."""
    warmup_steps: int | None = None
    """Updates until the peak; null: 60, or a tenth of the steps where that is less."""
    min_lr_ratio: float = 0.1
    """What the learning rate falls to at the end, as a share of its peak."""
    weight_decay: float = 0.1
    """AdamW's, on matrices; norms, convolutions and embeddings have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Greatest norm of a gradient; a longer one is shortened to it."""
    seed: int = 0
    """Of weights and of the order of the data."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of activations and of the weights they meet; the weights that are kept, and their gradients, are float32."""
    activation_checkpointing: bool = False
    """Whether blocks keep only their input, and compute the rest again for the gradient."""
    compile: bool = False
    """Whether blocks go through torch.compile."""
    shard_over: int | None = None
    """Processes that hold one copy of the weights together; null: all. Fewer: hybrid sharding."""

    save_every: int = 200
    """Updates from checkpoint to checkpoint; there is one at the end in any case."""
    keep_checkpoints: int = 2
    """How many checkpoints stay, the newest."""
    validate_every: int = 100
    """Updates from validation to validation; there is one at the end in any case."""
    validation_rows: int = 64
    """Sequences in the validation set; as many are tested, once, at the end."""

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
        return min(60, self.steps // 10) if self.warmup_steps is None else self.warmup_steps

    def learning_rate_at(self, step: int) -> float:
        """step counts from 0."""
        share = warmup_then_cosine(
            step, warmup_steps=self.num_warmup_steps, steps=self.steps, min_ratio=self.min_lr_ratio
        )
        return self.learning_rate * share

    def micro_batches(self, ranks: int) -> tuple[int, int]:
        """→ how many micro-batches a process takes in an update, and the rows of each.

        Raises ValueError where the batch does not come out even.
        """
        if self.batch_size % ranks:
            raise ValueError(f"batch_size: expected a multiple of the {ranks} processes, got {self.batch_size}")
        own = self.batch_size // ranks
        rows = self.micro_batch_size or own
        if own % rows:
            raise ValueError(
                f"micro_batch_size: expected a divisor of the {own} rows that each of {ranks} processes has of a batch "
                f"of {self.batch_size}, got {rows}"
            )
        return own // rows, rows
