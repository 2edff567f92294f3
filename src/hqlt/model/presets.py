"""The models of the paper, by name."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError

from hqlt.model.config import HQLTConfig
from hqlt.registry import check_choice

SIZES: dict[str, dict[str, Any]] = {
    "340m": {"hidden_size": 1024, "num_hidden_layers": 24},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 24},
}
BLENDS = {"": "synchronous", "-delayed-streaming": "delayed-streaming", "-delayed-chunk": "delayed-chunk"}
TINY: dict[str, Any] = {"hidden_size": 192, "num_heads": 6, "num_hidden_layers": 4, "vocab_size": 256}


def _all_presets() -> dict[str, dict[str, Any]]:
    presets: dict[str, dict[str, Any]] = {}
    for size, shape in SIZES.items():
        heads_of_128, heads_of_64 = shape["hidden_size"] // 128, shape["hidden_size"] // 64
        for ending, blend in BLENDS.items():
            presets[f"hqlt-{size}{ending}"] = {**shape, "num_heads": heads_of_128, "blend": blend}
        kinds = {kind: [kind] * shape["num_hidden_layers"] for kind in ("kv", "fw")}
        presets[f"transformer-{size}"] = {**shape, "num_heads": heads_of_64, "layer_kinds": kinds["kv"]}
        presets[f"deltanet-{size}"] = {**shape, "num_heads": heads_of_128, "layer_kinds": kinds["fw"], "beta_max": 1.0}
    return {**presets, "tiny": TINY}


PRESETS = _all_presets()
"""What each preset changes of `HQLTConfig`'s defaults."""


def preset(name: str, **changes: Any) -> HQLTConfig:
    """The configuration of this name, with some fields changed if wanted.

    "hqlt-340m", "hqlt-1.3b": synchronous, vector mixer, window 64, heads of 128; with "-delayed-streaming" and
    "-delayed-chunk" the other blends. "transformer-340m", "transformer-1.3b": Transformer++, full causal attention
    with rotary positions, heads of 64 (16 and 32; the paper gives the 16). "deltanet-340m", "deltanet-1.3b": heads of
    128, β in (0, 1), no convolution. "tiny": a synchronous model of 2 million parameters over bytes.

    >>> preset("hqlt-340m", window=128)

    Raises ValueError for an unknown name, with the nearest one, and for what HQLTConfig refuses.

    Source: the paper, section 4.1 and appendix.
    """
    check_choice("preset", name, PRESETS)
    try:
        return HQLTConfig(**{**PRESETS[name], **changes})
    except StrictDataclassError as error:  # of the wrong type
        raise ValueError(" ".join(str(error).split())) from error
