"""The Triton kernels of `hqlt.ops.synchronous.triton`. Importing them imports triton.

Letters as in `hqlt.shapes`: T new tokens, L pairs, H heads, C tokens in a chunk; K and V are padded to KP and VP,
powers of two. φK, R, S and the rest as in `hqlt.ops.delta_rule.chunked`.
"""
