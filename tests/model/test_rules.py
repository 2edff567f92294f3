"""Models with every registered rule: saving and loading, dtypes, the meta device, torch.export."""

from __future__ import annotations

import io

import pytest
import torch
from torch.export import Dim

from hqlt import registry
from hqlt.memory.fw import init_parameter
from hqlt.model import HQLTConfig, HQLTForCausalLM, register_cache_for_export
from hqlt.train.fit import parameter_groups
from tests.laws import close
from tests.model.conftest import SMALL

OURS = [name for name in registry.names("rule") if registry.find("rule", name).__module__.startswith("hqlt.")]
every_rule = pytest.mark.parametrize("rule", OURS)
KINDS = {"layer_kinds": ["hybrid", "fw"], "blend": "delayed-streaming", "write_gates": "own", "conv_size": 2}


def build(rule, **changes):
    torch.manual_seed(0)
    return HQLTForCausalLM(HQLTConfig(**SMALL, **KINDS, fast_weights=rule, **changes)).eval()


@every_rule
def test_weights_survive_a_file(rule, tmp_path, tokens):
    """All weights, including those with random initial values (A_log, dt_bias), and the config."""
    model = build(rule)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.25)
    model.save_pretrained(tmp_path)
    again = HQLTForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    for (name, mine), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    close(again(tokens).logits, model(tokens).logits, 1e-6)


@every_rule
def test_init_parameters_resets_parameters_unless_they_were_loaded(rule):
    fw = build(rule).model.layers[0].memory.fw
    own = dict(fw.named_parameters(recurse=False))
    for weight in own.values():
        torch.nn.init.constant_(weight, 7.0)
    fw.init_parameters()
    assert all((weight != 7).all() for weight in own.values()), "it sets all of the rule's own parameters"
    for weight in own.values():
        weight._is_hf_initialized = True
        init_parameter(weight, torch.zeros_like(weight))
        assert weight.any()


@every_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(rule, dtype, tokens):
    """Outputs have the model's dtype, fast weights at least float32, and both are close to float64."""
    model = build(rule).to(dtype)
    out = model(tokens, use_cache=True)
    assert out.logits.dtype == dtype
    for state in out.past_key_values.states:
        assert {part.dtype for part in state.fw} == {torch.promote_types(dtype, torch.float32)}
    expected = build(rule).to(dtype).double()(tokens).logits
    scale = expected.abs().max().item()
    close(out.logits.double() / scale, expected / scale, {torch.float32: 1e-5, torch.bfloat16: 0.1}.get(dtype, 1e-12))
    out.logits.float().square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


@every_rule
def test_a_model_can_be_built_on_the_meta_device(rule, tokens):
    """As FSDP and transformers do before loading weights. No parameter is a scalar or shared, because FSDP shards
    along the first axis.
    """
    model = build(rule)
    with torch.device("meta"):
        empty = build(rule)
    assert {weight.device.type for weight in empty.parameters()} == {"meta"}
    assert all(weight.dim() > 0 for weight in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    empty = empty.eval()
    for block in empty.model.layers:
        block.memory.like = torch.empty(0)
    close(empty(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)


@every_rule
def test_only_linear_maps_decay(rule):
    model = build(rule)
    decayed, others = (group["params"] for group in parameter_groups(model, 0.1))
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert all(weight.dim() == 2 for weight in decayed)
    own = {id(weight) for block in model.model.layers for weight in block.memory.fw.parameters(recurse=False)}
    assert own <= {id(weight) for weight in others}, sorted(names[x] for x in own)


@every_rule
@torch.no_grad()
def test_a_program_from_a_file(rule, tokens):
    """torch.export supports the rule's gates and state, also in a saved program."""
    register_cache_for_export()
    model = build(rule).double()
    del model.model.layers[1:]
    cache = model(tokens, use_cache=True).past_key_values
    rows = torch.utils._pytree.tree_map(lambda _: {0: Dim.DYNAMIC}, list(cache.states))
    shapes = {"input_ids": {0: Dim.DYNAMIC}, "past_key_values": [rows, None, None]}
    program = torch.export.export(model, (tokens[:, :1],), {"past_key_values": cache}, dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    step = torch.export.load(file).module()
    cache = model(tokens[:2], use_cache=True).past_key_values
    mine = step(tokens[:2, :1], past_key_values=cache.fork())
    theirs = model(tokens[:2, :1], past_key_values=cache)
    close(mine.logits, theirs.logits)
    for x, y in zip(mine.past_key_values.states, theirs.past_key_values.states, strict=True):
        assert type(x.fw) is type(y.fw)
        assert type(x.kv) is type(y.kv)
        for p, q in zip(x.leaves(), y.leaves(), strict=True):
            close(p, q)
