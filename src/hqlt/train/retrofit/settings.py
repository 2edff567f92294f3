"""Settings of a retrofit: the new layers, and the budgets of the stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hqlt.model.pretrained.retrofit import NO_RULE
from hqlt.ranges import COUNT, INDEX, NON_NEGATIVE, POSITIVE, SEED, check_ranges
from hqlt.registry import find, options_of
from hqlt.train.schedule import warmup_then_cosine


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The budget of one stage."""

    tokens: int = 0
    """Training tokens; 0 skips the stage."""
    length: int = 1024
    """Tokens per sequence."""
    batch_size: int = 4
    """Sequences per update."""
    learning_rate: float = 1e-3
    """Peak learning rate of new parameters; feature maps use five times this rate. Linear warmup over a tenth of the
    updates, at most 60, then cosine decay to a tenth."""

    @property
    def steps(self) -> int:
        """Number of updates."""
        return -(-self.tokens // (self.length * self.batch_size))

    def share_at(self, step: int) -> float:
        """The learning rate at a step, counted from 0, as a share of its peak."""
        return warmup_then_cosine(step, warmup_steps=min(60, self.steps // 10), steps=self.steps, min_ratio=0.1)


DEFAULT_OPTIONS = {"feature_map": "learned", "beta_bias": -6.0, "kv_gate": True}
"""Options for rules and mixers that have them. The feature map φ is learned, because queries and keys were trained for
softmax; a small initial β leaves room in the matrix for a long text; a gate lowers the weight of the window's read."""
STAGES = ("fit", "distill", "tune")


@dataclass(frozen=True, kw_only=True)
class RetrofitSettings:
    """Settings of a retrofit. With the defaults, a model with 135M parameters takes several hours on a CPU."""

    data: str = "python-library"
    """Training text, similar to what the model will read: a text file, whose last tenth is held out for validation; a
    folder written by `hqlt data prepare` with the model's tokenizer; or python-library."""
    window: int = 64
    """Window of the changed layers in tokens, including the current one."""
    sinks: int = 4
    """Number of first tokens of a text that stay visible."""
    rule: str = "delta"
    """Write rule of the FW-memories (docs/rules.md); none: no FW-memories, as a control."""
    retention: str = "recent"
    """Which KV entries stay visible beyond window and sinks: recent (none), surprise, value-norm, random."""
    kept: int = 0
    """Number of these entries per KV head."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other options of the layers: --options.NAME. Defaults, where rule and mixer have these options: kv_gate true,
    feature_map "learned", beta_bias -6."""

    full: int | list[int] | None = None
    """Layers that keep full attention: their number or a list of indices; null: a fifth of all layers."""
    full_choice: Literal["recall", "error", "random"] = "recall"
    """Which layers keep full attention if a number is given: those whose window costs the most recall of a repeated
    paragraph; those with the largest error of their attention's output (much faster to measure, and worse than a
    random choice in results/retrofit); or random ones, as a control."""
    measure_tokens: int = 8192
    """Tokens on which stage 0 measures what the window costs in each layer."""
    fit: Stage = Stage(tokens=1_000_000, learning_rate=2e-3)
    """Stage 1: fit the new parameters of each layer to the output of its original attention."""
    distill: Stage = Stage(tokens=2_000_000, learning_rate=1e-3)
    """Stage 2: fit the whole model to the original's predictions, at tokens beyond window and sinks."""
    tune: Stage = Stage()
    """Stage 3: train the whole model on the next token."""
    lora_rank: int = 16
    """Rank of LoRA on all linear maps in stages 2 and 3, merged at the end; 0: only new parameters are trained."""
    lora_learning_rate: float = 5e-4
    """Peak learning rate of LoRA."""

    max_grad_norm: float = 1.0
    """Maximum gradient norm; larger gradients are scaled down."""
    micro_batch_size: int = 1
    """Sequences per forward and backward pass."""
    seed: int = 0
    """Seed of new parameters, the order of the data, and the random choice of layers."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of activations and matrix products. Trained parameters and their gradients stay float32."""
    activation_checkpointing: bool = False
    """Whether blocks keep only their inputs and recompute their activations in the backward pass."""
    save_every: int = 50
    """Updates between checkpoints. One is saved at the end of each stage too."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    validation_rows: int = 8
    """Number of held-out sequences, of stage 2's length, to score before training and after each stage; 0: none."""

    def __post_init__(self) -> None:
        check_ranges(self, window=COUNT, sinks=INDEX, kept=INDEX, measure_tokens=COUNT, seed=SEED, lora_rank=INDEX)
        check_ranges(self, lora_learning_rate=POSITIVE, max_grad_norm=POSITIVE, micro_batch_size=COUNT)
        check_ranges(self, save_every=COUNT, keep_checkpoints=COUNT, validation_rows=INDEX)
        for name in STAGES:
            stage: Stage = getattr(self, name)
            check_ranges(stage, f"{name}.", tokens=INDEX, length=COUNT, batch_size=COUNT, learning_rate=NON_NEGATIVE)
            if stage.batch_size % self.micro_batch_size:
                raise ValueError(
                    f"micro_batch_size: expected a divisor of {name}.batch_size = {stage.batch_size}, got "
                    f"{self.micro_batch_size}"
                )
            if stage.length <= self.visible and stage.tokens:
                raise ValueError(
                    f"{name}.length: expected more than window + sinks = {self.visible} tokens, because only tokens "
                    f"beyond them are trained on, got {stage.length}"
                )
        if self.rule == NO_RULE and not self.lora_rank and (self.distill.tokens or self.tune.tokens):
            raise ValueError(
                "lora_rank: expected at least 1 with rule none, because there is nothing else to train, got 0; or pass "
                "--distill.tokens=0"
            )

    @property
    def visible(self) -> int:
        """Window + sinks: the number of first tokens of a segment whose outputs do not change."""
        return self.window + self.sinks

    @property
    def stages(self) -> list[tuple[str, Stage]]:
        """Names and budgets of the stages that train anything, in order."""
        named = [(name, getattr(self, name)) for name in STAGES]
        return [(name, stage) for name, stage in named if stage.steps and (name, self.rule) != ("fit", NO_RULE)]

    @property
    def steps(self) -> int:
        """Number of updates in all stages."""
        return sum(stage.steps for _, stage in self.stages)

    def layer_options(self) -> dict[str, Any]:
        """The arguments of `config_for` other than the layers that keep full attention."""
        own = {name: getattr(self, name) for name in ("window", "sinks", "rule", "retention", "kept")}
        if both := sorted(own.keys() & self.options):
            raise ValueError(f"options: expected {both[0]} as --{both[0]}, got it in --options")
        known: dict[str, Any] = {}
        if self.rule != NO_RULE:
            known = options_of(find("rule", self.rule, "fast_weights")) | options_of(find("mixer", "add"))
        return own | {name: value for name, value in DEFAULT_OPTIONS.items() if name in known} | self.options
