"""The Triton kernels of `hqlt.ops.synchronous.triton`. Importing them imports triton.

The letters are those of `hqlt.shapes`: T new tokens, L KV entries, H heads, C tokens per chunk. K and V are padded to
KP and VP, powers of two. φK, R, S, Y and U are as in `hqlt.ops.delta_rule.chunked`.
"""
