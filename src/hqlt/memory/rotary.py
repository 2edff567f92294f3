"""Rotary position embeddings: base, rotated fraction of a head, and scalings named as in transformers' configs.

Angles are computed in float64 (transformers computes them in float32). Nothing grows with the length of the text:
tables are made for the positions of one call's timeline.
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
    """The rotary embedding of a KV-memory's queries and keys.

        angle_i = position · f_i        f_i = theta^(−2i / width), scaled; i < width / 2

    Immutable and hashable: memories with the same embedding share their tables.

    Source:
        Su et al. 2021, "RoFormer", eq. 15 (with halves instead of adjacent pairs); for scalings see each function.
    """

    theta: float
    """Base of the frequencies."""
    fraction: float = 1.0
    """Fraction of a head that is rotated; the rest has no positions."""
    scaling: tuple[tuple[str, Any], ...] | None = None
    """Sorted items of transformers' `rope_scaling`. Default: no scaling."""

    @staticmethod
    def of(
        rope_theta: float | None,
        partial_rotary_factor: float = 1.0,
        rope_scaling: Mapping[str, Any] | None = None,
    ) -> Rotary | None:
        """Return the embedding that three fields of a config describe; None for no positions (`rope_theta` None).

        `rope_scaling` is as in transformers, such as {"rope_type": "linear", "factor": 2.0}. Supported types are
        "default", "linear", "llama3" and "yarn".

        Raises:
            ValueError: when a value is invalid, or when options are given without positions.
        """
        if rope_theta is None:
            if partial_rotary_factor != 1.0 or rope_scaling is not None:
                raise ValueError(
                    f"rope_theta: expected a number, as partial_rotary_factor={partial_rotary_factor} and "
                    f"rope_scaling={rope_scaling} are options of rotary positions, got None; remove them"
                )
            return None
        if not 1 < rope_theta < math.inf:
            raise ValueError(f"rope_theta: expected a number above 1, or None for no positions, got {rope_theta}")
        if not 0 < partial_rotary_factor <= 1:
            raise ValueError(f"partial_rotary_factor: expected a number in (0, 1], got {partial_rotary_factor}")
        return Rotary(float(rope_theta), float(partial_rotary_factor), _read(rope_scaling))

    def width(self, k: int) -> int:
        """Return how many channels of a head of width k are rotated: int(fraction · k), as in transformers.

        Raises:
            ValueError: when that number is not a positive even number.
        """
        width = int(k * self.fraction)
        if width < 2 or width % 2:
            raise ValueError(
                f"head_dim · partial_rotary_factor: expected an even number of at least 2, because rotary positions "
                f"rotate pairs of channels, got int({k} · {self.fraction}) = {width}; change one of them or set "
                f"rope_theta=None"
            )
        return width

    def table(self, l: int, k: int, device: torch.device, dtype: torch.dtype) -> Table:
        """Return cos and sin of the angles at positions 0 … l−1, times YaRN's attention factor: [l, 1, width/2] each.

        Tables are cached, except while torch is tracing.
        """
        return (_new_table if is_traced() else _cached_table)(self, l, k, device, dtype)

    def cos_sin(self, positions: Tensor, k: int, dtype: torch.dtype) -> Table:
        """Return cos and sin of the angles at these positions, Int[l]: [l, 1, width/2] each."""
        f, factor = self.frequencies(k)
        angle = positions.double()[:, None, None] * f.to(positions.device)
        dtype = at_least_float32(dtype)
        return (factor * angle.cos()).to(dtype), (factor * angle.sin()).to(dtype)

    def frequencies(self, k: int) -> tuple[Tensor, float]:
        """Return f [width/2] in float64 on the CPU, and the factor of cos and sin."""
        width = self.width(k)
        f = self.theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
        if self.scaling is None:
            return f, 1.0
        options = dict(self.scaling)
        return SCALINGS[options.pop("rope_type")](f, self.theta, **options)


def apply_rotary(x: Keys, cos: Tensor, sin: Tensor) -> Keys:
    """Apply a rotary embedding to the first `width` channels of each head of x [b, l, h, k].

    cos and sin are [l, 1, width/2], as from `Rotary.table`.
    """
    width = 2 * cos.shape[-1]
    if width == x.shape[-1]:
        return ops.rotated(x, cos, sin)
    return torch.cat([ops.rotated(x[..., :width], cos, sin), x[..., width:]], dim=-1)


def linear(f: Tensor, theta: float, *, factor: float) -> tuple[Tensor, float]:
    """Divide positions by `factor`. Source: Chen et al. 2023, "Extending Context Window of LLMs", section 2.3."""
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
    """Scale frequencies as Llama 3.1's code does.

    Frequencies with at most `low_freq_factor` periods in the original context are divided by `factor`, those with at
    least `high_freq_factor` periods are unchanged, and those in between are interpolated linearly.
    """
    if not low_freq_factor < high_freq_factor:
        raise ValueError(
            f"rope_scaling: expected low_freq_factor below high_freq_factor, got {low_freq_factor} and "
            f"{high_freq_factor}"
        )
    periods = original_max_position_embeddings * f / (2 * math.pi)
    unchanged = ((periods - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return unchanged * f + (1 - unchanged) * f / factor, 1.0


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
    """Scale frequencies as YaRN does.

    Frequencies with at least `beta_fast` periods in the original context are unchanged, those with at most `beta_slow`
    are divided by `factor`, and those in between are interpolated linearly over their indices. cos and sin are
    multiplied by the attention factor.

    Source:
        Peng et al. 2023, "YaRN", section 3.
    """
    n = len(f)
    fast, slow = (
        n * math.log(original_max_position_embeddings / (2 * math.pi * periods)) / math.log(theta)
        for periods in (beta_fast, beta_slow)
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
"""By transformers' `rope_type`: (f, theta, fields of the type) → (scaled f, factor of cos and sin)."""

DEPENDS_ON_LENGTH = ("dynamic", "longrope")
"""Types whose frequencies depend on the length of the text, which are not supported."""


def _read(rope_scaling: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...] | None:
    """Return the checked, sorted items without None values; None if nothing is scaled."""
    if rope_scaling is None:
        return None
    given = {name: value for name, value in rope_scaling.items() if value is not None}
    kind = given.pop("type", "default")  # its name in older configs
    kind = given.pop("rope_type", kind)
    if kind in DEPENDS_ON_LENGTH:
        raise ValueError(
            f"rope_scaling: expected a type whose frequencies are fixed, got {kind!r}: its frequencies change with the "
            f"length of the text, so that held keys would have to be rotated again"
        )
    check_choice("rope_scaling's rope_type", kind, ("default", *SCALINGS))
    spec = inspect.getfullargspec(SCALINGS.get(kind, lambda: None))
    optional = set(spec.kwonlydefaults or {})
    required = set(spec.kwonlyargs) - optional
    if not required <= set(given) <= required | optional:
        raise ValueError(
            f"rope_scaling: expected for rope_type {kind!r} the fields {', '.join(sorted(required)) or 'none'}"
            f"{' and optionally ' if optional else ''}{', '.join(sorted(optional))}, got {dict(rope_scaling)}"
        )
    for name, value in given.items():
        if name != "truncate" and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"rope_scaling: expected a number above 0 for {name}, got {value!r}")
    if kind == "default":
        return None
    read = tuple(sorted({"rope_type": kind, **given}.items()))
    Rotary(10_000.0, 1.0, read).frequencies(2)  # raises for values that the type does not accept
    return read


def _new_table(rotary: Rotary, l: int, k: int, device: torch.device, dtype: torch.dtype) -> Table:
    cos, sin = rotary.cos_sin(torch.arange(l, device="cpu"), k, dtype)
    return cos.to(device), sin.to(device)


@functools.lru_cache(maxsize=64)
def _cached_table(rotary: Rotary, l: int, k: int, device: torch.device, dtype: torch.dtype) -> Table:
    with torch.inference_mode(False):  # cached tables must be usable in training too
        return _new_table(rotary, l, k, device, dtype)
