"""Compile every kernel for a Hopper GPU, where there is none: python compile_kernels.py. Prints JSON.

"resources": at the sizes of a 340M layer in bfloat16. "narrow": lines of the float64 kernels' code with a float32 in
it. "variants": how often each kernel is compiled over calls of many lengths, windows and numbers of KV entries.
"""

import itertools
import json
import re

import torch

from hqlt.bench.gpu_compile import Shape, compile_all, compiling_for, launches_of, resources_of, variants

LENGTHS, HELD, WINDOWS = (1, 16, 35, 64, 100), (0, 1, 16, 9), (1, 7, 16, 64)

if __name__ == "__main__":
    with compiling_for(90):
        wide = launches_of(Shape(8, 2048, 8, 128, 128), torch.bfloat16)
        exact = launches_of(Shape(1, 70, 2, 16, 16, held=3, window=7), torch.float64)
        calls = [(Shape(b, t, 2, 16, 16, *rest), torch.bfloat16)
                 for b, t, *rest in itertools.product((1, 3), LENGTHS, HELD, WINDOWS)]  # fmt: skip
        compiled = dict(zip((call.name for call in wide), compile_all(wide), strict=True))
        float64 = {call.name: kernel.asm["ttir"] for call, kernel in zip(exact, compile_all(exact), strict=True)}
        answer = {
            "resources": {name: resources_of(kernel) for name, kernel in compiled.items()},
            "narrow": {name: re.findall(r".*\bf32\b.*", code) for name, code in float64.items()},
            "variants": variants(calls),
        }
    print(json.dumps(answer))
