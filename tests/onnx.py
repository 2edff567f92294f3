"""Export of modules to ONNX, run by onnxruntime."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from hqlt import native, ops

ANY = Dim.DYNAMIC

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnxscript", "onnxruntime")) or not native.available(),
    reason="export to ONNX needs onnxscript, onnxruntime (the extra `onnx`) and the native library",
)


class Exported:
    """A module exported to ONNX. Called with the module's arguments, it returns all tensors of the output."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any, **kwargs: Any) -> None:
        import onnxruntime

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)  # raised by torch itself
            program = torch.onnx.export(
                module, args, kwargs=kwargs, dynamo=True, verbose=False, dynamic_shapes=dynamic_shapes,
                custom_translation_table=ops.onnx_translations(),
            )  # fmt: skip
        assert program is not None
        self.session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())

    def __call__(self, *given: Any) -> list[Tensor]:
        names = [x.name for x in self.session.get_inputs()]
        inputs = zip(names, (x.numpy() for x in tensors(given)), strict=True)
        return [torch.from_numpy(x) for x in self.session.run(None, dict(inputs))]


def tensors(given: Any) -> list[Tensor]:
    """All tensors of a nested structure, in order."""
    return [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]


def check_same(mine: list[Tensor], theirs: Any, tolerance: float = 1e-5) -> None:
    for x, y in zip(mine, tensors(theirs), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
