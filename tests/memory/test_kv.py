from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hqlt.memory import KVMemory, kv
from hqlt.memory.rotary import Rotary
from hqlt.ops.features import rotated
from tests.laws import close, normal


def test_rotation_by_hand():
    """Width 4, θ = 100: the pair (x_0, x_2) turns by 1 a step, (x_1, x_3) by 1/10. At step 2, (1, 1, 0, 0)."""
    cos, sin = Rotary(100.0).table(3, 4, torch.device("cpu"), torch.float64)
    x = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64).expand(1, 3, 1, 4)
    angles = torch.tensor([2.0, 0.2], dtype=torch.float64)
    close(rotated(x, cos, sin)[0, 2, 0], torch.cat([angles.cos(), angles.sin()]))


def test_only_differences_of_positions_matter():
    """The same pairs with ten older ones, out of reach, before them."""
    memory = KVMemory(window=3, rope_theta=10_000.0)
    q, k, v = normal(1, 5, 2, 4), normal(1, 15, 2, 4), normal(1, 15, 2, 4, seed=1)
    close(memory.read(q, k[:, -7:], v[:, -7:], None), memory.read(q, k, v, None))


def test_table_made_in_inference_mode_serves_training():
    kv._kept_table.cache_clear()
    memory = KVMemory(window=3, rope_theta=10_000.0)
    with torch.inference_mode():
        memory.read(*(normal(1, 5, 2, 4),) * 3, None)
    q = normal(1, 5, 2, 4).requires_grad_()
    memory.read(q, q, q, None).sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, of its copies of programs
def test_a_table_changes_no_grad_mode_of_an_exported_program():
    """torch.export would record half of it: the program could not be decomposed, as for ONNX."""
    any_length = {"x": {1: torch.export.Dim.DYNAMIC}}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            program = torch.export.export(Rotated(), (normal(1, 5, 2, 4),), dynamic_shapes=any_length)
            x = normal(1, 7, 2, 4)
            close(program.run_decompositions({}).module()(x), Rotated()(x))
        assert not [node for node in program.graph.nodes if node.op == "get_attr"]


class Rotated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        cos, sin = Rotary(100.0).table(x.shape[1], x.shape[3], x.device, x.dtype)
        return rotated(x, cos, sin)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, of its forward-mode AD
def test_a_table_made_under_a_mode_stays_in_it():
    """The cache is the process's: what a mode made would reach every later call."""
    kv._kept_table.cache_clear()
    memory, q = KVMemory(window=3, rope_theta=10_000.0), normal(1, 5, 2, 4)
    expected = memory.read(q, q, q, None)
    kv._kept_table.cache_clear()
    with FakeTensorMode() as mode:
        memory.read(*(mode.from_tensor(q),) * 3, None)
    torch.func.jvp(lambda q: memory.read(q, q, q, None), (q,), (q,))
    with torch.device("meta"):
        assert torch.equal(memory.read(q, q, q, None), expected)
    assert torch.equal(memory.read(q, q, q, None), expected)
