"""Rotary positions: their base, the fraction of a head that they turn, and scalings as transformers' configs name them.

Everything is computed in float64 (transformers' own functions give float32), and nothing here grows with the text: a
table is made for the positions of one call's timeline.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hqlt import ops
from hqlt.native import is_traced
from hqlt.registry import check_choice
from hqlt.shapes import Keys, at_least_float32

Table = tuple[Tensor, Tensor]
"""cos and sin, each [l, 1, width/2], in at least float32."""


class Rotary(NamedTuple):
    """Which angles a KV-memory's keys and queries are turned by.

        angle_i = position · f_i        f_i = theta^(−2i / width), scaled; i < width / 2

    Hashable and immutable: two memories with the same positions share their tables.

    Source: Su et al. 2021, "RoFormer", eq. 15 (halves rotated); the scalings name their own.
    """

    theta: float
    fraction: float = 1.0
    """The part of a head that is turned; what remains has no positions."""
    scaling: tuple[tuple[str, Any], ...] | None = None
    """The items of transformers' `rope_scaling`, sorted; None: not scaled."""

    @staticmethod
    def of(
        rope_theta: float | None,
        partial_rotary_factor: float = 1.0,
        rope_scaling: Mapping[str, Any] | None = None,
    ) -> Rotary | None:
        """What three fields of a config mean; None for no positions (`rope_theta` None).

        rope_scaling: {"rope_type": "linear", "factor": 2.0} and so on, as transformers names it; the types are
        "default", "linear", "llama3" and "yarn".

        Raises ValueError for values that no positions can be made of, and for options without positions.
        """
        if rope_theta is None:
            if partial_rotary_factor != 1.0 or rope_scaling is not None:
                raise ValueError(
                    f"rope_theta: expected a number, as partial_rotary_factor={partial_rotary_factor} and "
                    f"rope_scaling={rope_scaling} are options of rotary positions, got None; leave them out"
                )
            return None
        if not 1 < rope_theta < math.inf:
            raise ValueError(f"rope_theta: expected a number above 1, or None for no positions, got {rope_theta}")
        if not 0 < partial_rotary_factor <= 1:
            raise ValueError(f"partial_rotary_factor: expected a number in (0, 1], got {partial_rotary_factor}")
        return Rotary(float(rope_theta), float(partial_rotary_factor), _read(rope_scaling))

    def width(self, k: int) -> int:
        """How many numbers of a head of width k are turned: int(fraction · k), as in transformers.

        Raises ValueError where they are no pairs.
        """
        width = int(k * self.fraction)
        if width < 2 or width % 2:
            raise ValueError(
                f"head_dim · partial_rotary_factor: expected an even number of at least 2, because rotary positions "
                f"turn pairs of numbers, got int({k} · {self.fraction}) = {width}; change one of them or set "
                f"rope_theta=None"
            )
        return width

    def table(self, l: int, k: int, device: torch.device, dtype: torch.dtype) -> Table:
        """cos and sin of the angles at positions 0 … l−1, times yarn's attention factor: [l, 1, width/2] each.

        Kept from call to call, but for those made while something of torch traces: they belong to it.
        """
        return (_new_table if is_traced() else _kept_table)(self, l, k, device, dtype)

    def cos_sin(self, positions: Tensor, k: int, dtype: torch.dtype) -> Table:
        """cos and sin of the angles at these positions, Int[l]: [l, 1, width/2] each. The angles are float64."""
        f, factor = self.frequencies(k)
        angle = positions.double()[:, None, None] * f.to(positions.device)
        dtype = at_least_float32(dtype)
        return (factor * angle.cos()).to(dtype), (factor * angle.sin()).to(dtype)

    def frequencies(self, k: int) -> tuple[Tensor, float]:
        """f [width/2] in float64 on the CPU, and the factor of cos and sin."""
        width = self.width(k)
        f = self.theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
        if self.scaling is None:
            return f, 1.0
        options = dict(self.scaling)
        return SCALINGS[options.pop("rope_type")](f, self.theta, **options)


def apply_rotary(x: Keys, cos: Tensor, sin: Tensor) -> Keys:
    """The first numbers of each head turned, as many as the table is for; the others as they are.

    x: [b, l, h, k]. cos, sin: [l, 1, width/2], of `Rotary.table`.
    """
    width = 2 * cos.shape[-1]
    if width == x.shape[-1]:
        return ops.rotated(x, cos, sin)
    return torch.cat([ops.rotated(x[..., :width], cos, sin), x[..., width:]], dim=-1)


def linear(f: Tensor, theta: float, *, factor: float) -> tuple[Tensor, float]:
    """Positions divided by `factor`. Source: Chen et al. 2023, "Extending Context Window of LLMs", section 2.3."""
    return f / factor, 1.0


def llama3(
    f: Tensor,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> tuple[Tensor, float]:
    """Frequencies of at most `low_freq_factor` turns in the original context divided by `factor`, those of at least
    `high_freq_factor` as they are, a linear blend between. Source: Llama 3.1's code.
    """
    if not low_freq_factor < high_freq_factor:
        raise ValueError(
            f"rope_scaling: expected low_freq_factor below high_freq_factor, got {low_freq_factor} and "
            f"{high_freq_factor}"
        )
    turns = original_max_position_embeddings * f / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return kept * f + (1 - kept) * f / factor, 1.0


def yarn(
    f: Tensor,
    theta: float,
    *,
    factor: float,
    original_max_position_embeddings: int,
    attention_factor: float | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> tuple[Tensor, float]:
    """Frequencies of at least `beta_fast` turns in the original context as they are, those of at most `beta_slow`
    divided by `factor`, a linear blend over their indices between; cos and sin times the attention factor.

    Source: Peng et al. 2023, "YaRN", section 3.
    """
    n = len(f)
    fast, slow = (
        n * math.log(original_max_position_embeddings / (2 * math.pi * turns)) / math.log(theta)
        for turns in (beta_fast, beta_slow)
    )
    if truncate:
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, 2 * n - 1)
    index = torch.arange(n, dtype=torch.float64, device="cpu")
    scaled = ((index - fast) / ((slow - fast) or 0.001)).clamp(0, 1)

    def growth(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if attention_factor is None:
        attention_factor = growth(mscale) / growth(mscale_all_dim) if mscale and mscale_all_dim else growth(1.0)
    return (1 - scaled) * f + scaled * f / factor, attention_factor


SCALINGS: dict[str, Callable[..., tuple[Tensor, float]]] = {"linear": linear, "llama3": llama3, "yarn": yarn}
"""By transformers' `rope_type`: (f, theta, the type's own fields) → (f scaled, the factor of cos and sin)."""

DEPENDS_ON_LENGTH = ("dynamic", "longrope")


def _read(rope_scaling: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...] | None:
    """Checked, without what is None, sorted; None where nothing is scaled."""
    if rope_scaling is None:
        return None
    given = {name: value for name, value in rope_scaling.items() if value is not None}
    kind = given.pop("type", "default")  # what older configs call it
    kind = given.pop("rope_type", kind)
    if kind in DEPENDS_ON_LENGTH:
        raise ValueError(
            f"rope_scaling: expected a type whose frequencies are fixed, got {kind!r}: its frequencies change with the "
            f"length of the text, so that keys held from before would have to be turned anew"
        )
    check_choice("rope_scaling's rope_type", kind, ("default", *SCALINGS))
    spec = inspect.getfullargspec(SCALINGS.get(kind, lambda: None))
    optional = set(spec.kwonlydefaults or {})
    required = set(spec.kwonlyargs) - optional
    if not required <= set(given) <= required | optional:
        raise ValueError(
            f"rope_scaling: expected beside rope_type {kind!r} the fields {', '.join(sorted(required)) or 'none'}"
            f"{' and perhaps ' if optional else ''}{', '.join(sorted(optional))}, got {dict(rope_scaling)}"
        )
    for name, value in given.items():
        if name != "truncate" and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"rope_scaling: expected for {name} a number above 0, got {value!r}")
    if kind == "default":
        return None
    read = tuple(sorted({"rope_type": kind, **given}.items()))
    Rotary(10_000.0, 1.0, read).frequencies(2)  # a type knows what it refuses
    return read


def _new_table(rotary: Rotary, l: int, k: int, device: torch.device, dtype: torch.dtype) -> Table:
    cos, sin = rotary.cos_sin(torch.arange(l, device="cpu"), k, dtype)
    return cos.to(device), sin.to(device)


@functools.lru_cache(maxsize=64)
def _kept_table(rotary: Rotary, l: int, k: int, device: torch.device, dtype: torch.dtype) -> Table:
    with torch.inference_mode(False):  # what is kept must serve training too
        return _new_table(rotary, l, k, device, dtype)
