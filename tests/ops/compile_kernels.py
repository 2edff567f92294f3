"""Compile every kernel for a Hopper GPU, where there is none: python compile_kernels.py.

At the sizes of a 340M layer in bfloat16. Prints {kernel: [bytes of its stack, uses the matrix instructions]}; a stack
means that registers did not suffice.
"""

import inspect
import json
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hqlt.ops.synchronous.kernels import attention, autograd, delta_rule, delta_rule_backward, reads, step

KERNELS = {
    "each_chunk": [
        delta_rule.prepare, reads.read, reads.mix_backward, attention.query_backward, attention.key_backward,
        delta_rule_backward.read_backward, delta_rule_backward.write_backward, step.step,
    ],
    "each_slice": [delta_rule.carry, delta_rule_backward.carry_backward],
}  # fmt: skip
TYPES = {
    "fp32": "scale norm_eps",
    "i32": "T L window slots",
    "*fp32": "beta cos sin initial final d_final d_initial d_weight log_total kv_slope d_beta W W_after",
    "*i32": "ids",
    "*i64": "position position_after",
    "*i1": "resets",
}
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names.split()}


def compiled(kernel, named):
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {name: value for name, value in named.items() if name in names and name not in ("T", "L")}
    types = {name: "constexpr" if name in constants else TYPE_OF.get(name, "*bf16") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    options = {name: named[name] for name in ("num_warps", "num_stages")}
    binary = triton.compile(ASTSource(kernel, types, constants, aligned), GPUTarget("cuda", 90, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", told)[1]), "wgmma" in binary.asm["ptx"]


if __name__ == "__main__":
    x = torch.empty(8, 2048, 8, 128, dtype=torch.bfloat16, device="meta")
    size = autograd.sizes(x, x, x)
    named = {"each_chunk": size.named | {"PRECISION": "tf32", "BLOCK": 32}, "each_slice": size.slices}
    print(
        json.dumps(
            {kernel.__name__: compiled(kernel, named[grid]) for grid, some in KERNELS.items() for kernel in some}
        )
    )
