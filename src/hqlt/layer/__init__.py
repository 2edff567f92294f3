"""The hybrid memory layer, and the modules around it in a block."""

from hqlt.layer.block import BLOCK_NORMS, Block, SwiGLU
from hqlt.layer.convolution import ShortConvolution
from hqlt.layer.layer import HybridMemory, arguments_of, layer_arguments
from hqlt.layer.norm import RMSNorm, ZeroCenteredRMSNorm
from hqlt.layer.retention import enable_retention, with_retention

__all__ = [
    "BLOCK_NORMS",
    "Block",
    "HybridMemory",
    "RMSNorm",
    "ShortConvolution",
    "SwiGLU",
    "ZeroCenteredRMSNorm",
    "arguments_of",
    "enable_retention",
    "layer_arguments",
    "with_retention",
]
