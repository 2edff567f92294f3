"""Language models exported to ONNX and run by onnxruntime: a text and its cache, then token by token.

`make test-onnx` runs this if the packages are installed.
"""

from __future__ import annotations

import pytest
import torch

from hqlt.model import HQLTConfig, HQLTForCausalLM, register_cache_for_export
from tests.model.conftest import KINDS, SMALL
from tests.model.test_export import any_rows, some_tokens
from tests.onnx import ANY, Exported, check_same, needs_onnx

pytestmark = needs_onnx


def build(kind: str, **changes: int) -> HQLTForCausalLM:
    torch.manual_seed(0)
    return HQLTForCausalLM(HQLTConfig(**{**SMALL, **KINDS[kind], **changes})).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["synchronous", "convolution", "alternating"])
def test_a_text_and_then_step_by_step(kind):
    register_cache_for_export()
    model = build(kind)
    tokens = some_tokens(3, 11)
    text = Exported(model, (tokens,), {"input_ids": {0: ANY, 1: ANY}, "use_cache": None}, use_cache=True)
    cache = model(tokens, use_cache=True).past_key_values
    shapes = {"input_ids": {0: ANY}, "past_key_values": any_rows(model)}
    step = Exported(model, (tokens[:, :1],), shapes, past_key_values=cache)
    for b, t in ((1, 1), (4, 23)):
        given = some_tokens(b, t)
        mine, theirs = text(given), model(given, use_cache=True)
        for _ in range(3):
            check_same(mine, (theirs.logits, theirs.past_key_values))
            given = some_tokens(b, 1)
            mine = step(given, mine[1:])
            theirs = model(given, past_key_values=theirs.past_key_values)


@torch.no_grad()
def test_padded_rows():
    model = build("delayed-streaming", num_hidden_layers=1)
    shapes = {"input_ids": {0: ANY, 1: ANY}, "attention_mask": {0: ANY, 1: ANY}, "use_cache": None}
    mask = (torch.arange(11) >= torch.tensor([0, 7, 4])[:, None]).long()
    text = Exported(model, (some_tokens(3, 11),), shapes, attention_mask=mask, use_cache=False)
    for b, t in ((3, 11), (4, 9)):
        tokens, mask = some_tokens(b, t), torch.ones(b, t, dtype=torch.long)
        mask[0, : t // 2] = mask[-1, -1:] = 0
        (mine,) = text(tokens, mask)
        theirs = model(tokens, attention_mask=mask, use_cache=False).logits
        check_same([mine[mask == 1]], theirs[mask == 1])
