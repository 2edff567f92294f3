"""A model loaded with accelerate's device maps, offloaded or not, gives the same results.

Skipped if accelerate is not installed.
"""

from __future__ import annotations

import pytest
import torch

from hqlt.model import HQLTCache, HQLTForCausalLM

pytest.importorskip("accelerate")

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("where", ["cpu", "auto", "disk"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_device_map_changes_nothing(model, tokens, tmp_path, where, tied):
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "model")
    device_map = where
    if where == "disk":
        names = [
            "model.embed_tokens",
            "model.norm",
            "lm_head",
            *(f"model.layers.{i}" for i in range(len(model.model.layers))),
        ]
        device_map = {name: "disk" if name.endswith("1") else "cpu" for name in names}
    mapped = HQLTForCausalLM.from_pretrained(
        tmp_path / "model", dtype="auto", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(p.is_meta for p in mapped.parameters()) == (where == "disk")
    caches = [HQLTCache(), HQLTCache()]
    with torch.no_grad():
        for chunk in tokens.split(6, dim=1):
            mine, theirs = (m(chunk, past_key_values=c).logits for m, c in zip((mapped, model), caches, strict=True))
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    assert torch.equal(mapped.generate(tokens, **GREEDY), model.generate(tokens, **GREEDY))


def test_a_block_is_never_split(one_model):
    from accelerate import infer_auto_device_map

    size = sum(p.numel() * p.element_size() for p in one_model.model.layers[0].parameters())
    whole = list(one_model._no_split_modules)  # accelerate before 1.13 mistakes a set for one class
    device_map = infer_auto_device_map(
        one_model, max_memory={"cpu": 2 * size, "disk": 10**9}, no_split_module_classes=whole
    )
    assert not [name for name in device_map if name.startswith("model.layers.") and name.count(".") > 2]
