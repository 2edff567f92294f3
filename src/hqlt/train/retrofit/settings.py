"""What a retrofit is: the layers that it makes, and the budgets of its stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hqlt.model.pretrained.retrofit import NO_RULE
from hqlt.ranges import COUNT, INDEX, NON_NEGATIVE, POSITIVE, SEED, check_ranges
from hqlt.registry import find, options_of
from hqlt.train.schedule import warmup_then_cosine


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The budget of one stage, and how it is spent."""

    tokens: int = 0
    """Tokens that it reads; 0: it is skipped."""
    length: int = 1024
    """Tokens in a sequence."""
    batch_size: int = 4
    """Sequences in an update."""
    learning_rate: float = 1e-3
    """Of new parameters (of feature maps, five times as much), at its peak: linear warm-up over a tenth of the updates,
    60 at most, then a cosine to a tenth."""

    @property
    def steps(self) -> int:
        """Updates."""
        return -(-self.tokens // (self.length * self.batch_size))

    def share_at(self, step: int) -> float:
        """Of the peak that the learning rate has at a step, counted from 0."""
        return warmup_then_cosine(step, warmup_steps=min(60, self.steps // 10), steps=self.steps, min_ratio=0.1)


BEGIN = {"feature_map": "learned", "beta_bias": -6.0, "kv_gate": True}
"""Options, of rules and the mixer that have them, with which a retrofit does better: queries and keys of a softmax are
not made for φ; a small β leaves room in the matrix for a long text; the window's read gives weight back."""
STAGES = ("fit", "distill", "tune")


@dataclass(frozen=True, kw_only=True)
class RetrofitSettings:
    """The defaults take a model of 135M parameters some hours on a CPU."""

    data: str = "python-library"
    """A text file, whose last tenth is held out for validation; a folder that `hqlt data prepare` wrote with the
    model's tokenizer; or python-library. Text like what the model will read."""
    window: int = 64
    """Tokens that an attention reaches from now on, the current one included."""
    sinks: int = 4
    """First tokens of a text that stay visible."""
    rule: str = "delta"
    """The write rule of the FW-memories (docs/rules.md); none: there are none, the control."""
    retention: str = "recent"
    """Which entries stay visible beyond window and sinks: recent for none, surprise, value-norm, random."""
    kept: int = 0
    """Entries that a KV head keeps so."""
    options: dict[str, Any] = field(default_factory=dict)
    """What else the layers are built with: --options.NAME. Unless given, kv_gate is true, and rules that have such
    options begin with feature_map "learned" and beta_bias -6."""

    full: int | list[int] | None = None
    """Layers that stay full attention: how many, or a list of indices; null: a fifth of them."""
    full_choice: Literal["error", "random"] = "error"
    """Which, where a number is given: those whose output the window changes most, or any, the control."""
    measure_tokens: int = 8192
    """Stage 0: tokens on which it is measured what the window changes."""
    fit: Stage = Stage(tokens=1_000_000, learning_rate=2e-3)
    """Stage 1: each layer's new parameters to the output of its attention."""
    distill: Stage = Stage(tokens=2_000_000, learning_rate=1e-3)
    """Stage 2: the whole model to the original's predictions, where the window has an end."""
    tune: Stage = Stage()
    """Stage 3: the whole model to the next token."""
    lora_rank: int = 16
    """Rank of the changes to all linear maps in stages 2 and 3, merged at the end; 0: new parameters alone are
    trained."""
    lora_learning_rate: float = 5e-4
    """Its peak."""

    max_grad_norm: float = 1.0
    """Greatest norm of a gradient; a longer one is shortened to it."""
    micro_batch_size: int = 1
    """Sequences that are taken at once."""
    seed: int = 0
    """Of new parameters, of the order of the data, and of a random choice of layers."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of activations and of the weights they meet; what is trained, and its gradients, are float32."""
    activation_checkpointing: bool = False
    """Whether blocks keep only their input, and compute the rest again for the gradient."""
    save_every: int = 50
    """Updates from checkpoint to checkpoint; there is one at the end of each stage in any case."""
    keep_checkpoints: int = 2
    """How many checkpoints stay, the newest."""
    validation_rows: int = 8
    """Held-out sequences of stage 2's length, on which the model is scored before training and after each stage; 0:
    none."""

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
            if stage.length <= self.reach and stage.tokens:
                raise ValueError(
                    f"{name}.length: expected more than window + sinks = {self.reach} tokens, beyond which there is "
                    f"something to be learned, got {stage.length}"
                )
        if self.rule == NO_RULE and not self.lora_rank and (self.distill.tokens or self.tune.tokens):
            raise ValueError(
                "lora_rank: expected at least 1 with rule none, because there is nothing else to train, got 0; or give "
                "--distill.tokens=0"
            )

    @property
    def reach(self) -> int:
        """Tokens from a segment's beginning for which nothing changes."""
        return self.window + self.sinks

    @property
    def stages(self) -> list[tuple[str, Stage]]:
        """By name, in order: those that have something to do."""
        named = [(name, getattr(self, name)) for name in STAGES]
        return [(name, stage) for name, stage in named if stage.steps and (name, self.rule) != ("fit", NO_RULE)]

    @property
    def steps(self) -> int:
        """Updates of all stages."""
        return sum(stage.steps for _, stage in self.stages)

    def layer_options(self) -> dict[str, Any]:
        """What `config_for` takes beside the layers that stay full."""
        own = {name: getattr(self, name) for name in ("window", "sinks", "rule", "retention", "kept")}
        if both := sorted(own.keys() & self.options):
            raise ValueError(f"options: expected {both[0]} as --{both[0]}, got it as an option")
        known: dict[str, Any] = {}
        if self.rule != NO_RULE:
            known = options_of(find("rule", self.rule, "fast_weights")) | options_of(find("mixer", "add"))
        return own | {name: value for name, value in BEGIN.items() if name in known} | self.options
