"""Named configurations: the models of the paper, and a tiny one."""

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
"""The fields of each preset that differ from `HQLTConfig`'s defaults."""


def preset(name: str, **changes: Any) -> HQLTConfig:
    """Return a named configuration.

    - "hqlt-340m", "hqlt-1.3b": synchronous blend, vector mixer, window 64, head width 128. With the suffix
      "-delayed-streaming" or "-delayed-chunk": the other blends.
    - "transformer-340m", "transformer-1.3b": Transformer++, i.e. full causal attention with rotary embeddings, head
      width 64 (16 and 32 heads; the paper only gives the 16).
    - "deltanet-340m", "deltanet-1.3b": head width 128, β in (0, 1), no convolution.
    - "tiny": a synchronous model with 2 million parameters over bytes.

    Args:
        name: name of the preset.
        **changes: fields of `HQLTConfig` to override.

    Returns:
        A new configuration.

    Raises:
        ValueError: when the name is unknown, or as `HQLTConfig` does.

    Source:
        Irie et al. 2025 (arXiv 2506.00744), section 4.1 and appendix.

    Example:
        >>> from hqlt.model import preset
        >>> config = preset("hqlt-340m", window=128)
        >>> config.num_hidden_layers, config.window
        (24, 128)
    """
    check_choice("preset", name, PRESETS)
    try:
        return HQLTConfig(**{**PRESETS[name], **changes})
    except StrictDataclassError as error:  # a value of the wrong type
        raise ValueError(" ".join(str(error).split())) from error
