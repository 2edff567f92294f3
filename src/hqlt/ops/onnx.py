"""This package's operators in ONNX, for any batch size and length: a Scan over time for the FW-memory, and dense masked
attention for the KV-memory. Imported by `hqlt.ops.onnx_translations`.

Each function has the signature of the operator that it translates, and receives symbolic tensors of `torch.onnx`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, Union

import torch
from onnxscript import BOOL, DOUBLE, FLOAT, INT64, graph, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

from hqlt.ops.expiry import NEVER
from hqlt.ops.linear_attention.state import EPSILON

HQLT = Opset("hqlt", 1)
X = TypeVar("X", bound=Union[FLOAT, DOUBLE])  # noqa: UP007 (onnxscript supports no other unions)
N = TypeVar("N", bound=Union[FLOAT, DOUBLE, INT64])  # noqa: UP007


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translation to ONNX of each operator that PyTorch's exporter does not support."""
    return {
        torch.ops.hqlt.delta_rule.default: delta_rule,
        torch.ops.hqlt.fast_weights.default: fast_weights,
        torch.ops.hqlt.linear_attention.default: linear_attention,
        torch.ops.hqlt.window_attention.default: window_attention,
        torch.ops.hqlt.expiry.default: expiry,
        torch.ops.hqlt.unit_silu.default: unit_silu,
        torch.ops.hqlt.rotate.default: rotate,
        torch.ops.hqlt.rms_norm.default: rms_norm,
        torch.ops.hqlt.mix.default: mix,
        torch.ops.aten.cummax.default: cummax,  # used for positions within segments
        torch.ops.aten.sort.stable: sort,  # used for the order in which chunks are read and written
    }


def delta_rule(q, k, v, beta, state, resets, live, scale, keep):
    return fast_weights(q, k, v, beta, None, None, state, resets, live, True, scale, keep)


def fast_weights(q, k, v, beta, decay, a, state, resets, live, erases, scale, keep):
    """The equation of `hqlt.ops.fast_weights`. The scan's steps are writes: the matrix decays at the first write of a
    token, and is read at the last."""
    queries, resets = op.Mul(grouped(q, k), op.CastLike(scale, q)), resets_or_none(resets, q)
    if decay is None:
        log_alpha = op.Unsqueeze(zeros(q, op.Shape(q, end=2)), [2, 3])
    else:
        (log_alpha,) = written(live, decay)
        log_alpha = log_alpha if len(decay.shape) == 4 else op.Unsqueeze(log_alpha, [3])
    several = k.shape[1] != q.shape[1]
    if several:
        n, m = length(k), op.Div(length(k), length(q))
        write = op.Range(0, n, 1)
        token = op.Div(write, m)
        first = op.Unsqueeze(op.Equal(write, op.Mul(token, m)), [0])
        queries, resets, log_alpha = (op.Gather(x, token, axis=1) for x in (queries, resets, log_alpha))
        resets = op.And(resets, first)
        log_alpha = op.Where(op.Unsqueeze(first, [2, 3]), log_alpha, op.CastLike(0.0, q))
        live = live if live is None else op.Gather(live, token, axis=1)
    key, value, strength = written(live, k, v, beta)
    (erased,) = written(live, a) if a is not None else (key,) if erases else (zeros(k, op.Shape(k)),)
    out, final, errors = write_scan(queries, key, value, strength, op.Exp(log_alpha), erased, state, resets)
    out = op.Gather(out, op.Range(op.Sub(m, 1), n, m), axis=1) if several else out
    return ungrouped(out, q, v), final, errors


@script(HQLT, default_opset=op)
def write_scan(q: X, k: X, v: X, beta: X, alpha: X, a: X, state: X, resets: BOOL) -> tuple[X, X, X]:
    """Scan over writes [b, t, …]; q is [b, t, h, g, k], α [b, t, h or 1, k or 1], state [b, h, k, v].

    Returns the reads, the final state and the errors v − Sᵀa.
    """

    @graph()
    def step(S, q_t, k_t, v_t, beta_t, alpha_t, a_t, reset_t):
        kept = op.Where(op.Unsqueeze(reset_t, [1, 2, 3]), op.CastLike(0.0, S), S)
        decayed = op.Unsqueeze(alpha_t, [3]) * kept
        error = v_t - op.Squeeze(op.MatMul(op.Unsqueeze(a_t, [2]), decayed), [2])
        correction = op.Unsqueeze(beta_t, [2]) * error
        S_t = decayed + op.Unsqueeze(k_t, [3]) * op.Unsqueeze(correction, [2])
        read = op.MatMul(q_t, S_t)
        return S_t, read, error

    final, out, errors = op.Scan(
        state, q, k, v, beta, alpha, a, resets,
        body=step, num_scan_inputs=7, scan_input_axes=[1, 1, 1, 1, 1, 1, 1], scan_output_axes=[1, 1],
    )  # fmt: skip
    return out, final, errors


def linear_attention(q, k, v, matrix, key_sum, resets, live):
    marks, (key, value) = resets_or_none(resets, q), written(live, k, v)
    reads, weights, matrix, key_sum = linear_attention_scan(grouped(q, k), key, value, matrix, key_sum, marks)
    return ungrouped(op.Div(reads, with_epsilon(weights, EPSILON)), q, v), matrix, key_sum


@script(HQLT, default_opset=op)
def linear_attention_scan(q: X, k: X, v: X, matrix: X, key_sum: X, resets: BOOL) -> tuple[X, X, X, X]:
    """Scan over tokens [b, t, …]; q is [b, t, h, g, k], matrix [b, h, k, v], key_sum [b, h, k].

    Returns the reads, their normalizers, the final matrix and the final key sum.
    """

    @graph()
    def step(W, z, q_t, k_t, v_t, reset_t):
        nothing = op.CastLike(0.0, W)
        W_t = op.Where(op.Unsqueeze(reset_t, [1, 2, 3]), nothing, W) + op.Unsqueeze(k_t, [3]) * op.Unsqueeze(v_t, [2])
        z_t = op.Where(op.Unsqueeze(reset_t, [1, 2]), nothing, z) + k_t
        read = op.MatMul(q_t, W_t)
        weight = op.MatMul(q_t, op.Unsqueeze(z_t, [3]))
        return W_t, z_t, read, weight

    final, final_sum, reads, weights = op.Scan(
        matrix, key_sum, q, k, v, resets,
        body=step, num_scan_inputs=4, scan_input_axes=[1, 1, 1, 1], scan_output_axes=[1, 1],
    )  # fmt: skip
    return reads, weights, final, final_sum


def window_attention(q, k, v, resets, until, q_far, k_far, window, most, scale):
    t, l = length(q), length(k)
    now = op.Range(op.Sub(l, t), l, 1)
    age = op.Sub(op.Unsqueeze(now, [1]), op.Range(0, l, 1))
    reach = op.And(op.GreaterOrEqual(age, 0), op.Less(age, window))  # [t, l]
    if resets is not None:
        ids = op.CumSum(op.Cast(resets, to=INT64.dtype), 1)
        same = op.Equal(op.Unsqueeze(op.Gather(ids, now, axis=1), [1, 2, 4]), op.Unsqueeze(ids, [1, 2, 3]))
        reach = op.And(reach, same)  # [b, 1, 1, t, l]
    scores = all_scores(q, k, scale)
    if until is not None:
        visible = op.Less(op.Unsqueeze(now, [1]), op.Unsqueeze(op.Transpose(until, perm=[0, 2, 1]), [2, 3]))
        if q_far is not None:
            scores = op.Where(reach, scores, all_scores(q_far, k_far, scale))
        reach = op.Or(reach, op.And(op.GreaterOrEqual(age, 0), visible))  # [b, h, 1, t, l]
    value = op.Unsqueeze(op.Transpose(v, perm=[0, 2, 1, 3]), [2])
    weights = op.Softmax(op.Where(reach, scores, op.CastLike(float("-inf"), q)), axis=-1)
    return ungrouped(op.Transpose(op.MatMul(weights, value), perm=[0, 3, 1, 2, 4]), q, v)


def all_scores(q, k, scale):
    """Scores of all queries and keys: [b, h, g, t, l]."""
    query = op.Transpose(op.Mul(grouped(q, k), op.CastLike(scale, q)), perm=[0, 2, 3, 1, 4])
    return op.MatMul(query, op.Unsqueeze(op.Transpose(k, perm=[0, 2, 3, 1]), [2]))


def expiry(scores, leaves, used, resets, kept):
    """Compares all pairs of entries: outranks[b, h, j, i] is whether entry i outranks entry j."""
    score, l = op.Transpose(scores, perm=[0, 2, 1]), length(scores)
    mine, other, index = op.Unsqueeze(score, [3]), op.Unsqueeze(score, [2]), op.Range(0, l, 1)
    older = op.Less(index, op.Unsqueeze(index, [1]))
    outranks = op.Or(op.Greater(other, mine), op.And(op.Equal(other, mine), older))
    if used is not None:
        outranks = op.And(outranks, op.Unsqueeze(used, [1, 2]))
    if resets is not None:
        ids = op.CumSum(op.Cast(resets, to=INT64.dtype), 1)
        outranks = op.And(outranks, op.Equal(op.Unsqueeze(ids, [1, 3]), op.Unsqueeze(ids, [1, 2])))
    fewer = op.Less(op.CumSum(op.Cast(outranks, to=INT64.dtype), 3), kept)
    last = op.ReduceSum(op.Cast(fewer, to=INT64.dtype), [3], keepdims=0)  # l if fewer than `kept` outrank the entry
    leaves = op.Unsqueeze(leaves, [1])
    never = op.Expand(op.Constant(value_ints=[NEVER]), op.Shape(op.Slice(leaves, [0], [1], [2])))
    ends = op.Expand(op.Concat(leaves, never, axis=2), op.Constant(value_ints=[1, scores.shape[2], 1]))
    until = op.Max(leaves, op.GatherElements(ends, last, axis=2))
    until = until if used is None else op.Where(op.Unsqueeze(used, [1]), until, 0)
    return op.Transpose(until, perm=[0, 2, 1])


def unit_silu(x):
    x = op.Mul(x, op.Sigmoid(x))
    return op.Div(x, op.Sqrt(with_epsilon(op.ReduceSumSquare(x, [-1]), 1e-6)))


def rotate(x, cos, sin, direction):
    first, second = op.Split(x, axis=-1, num_outputs=2)
    sin = op.Mul(sin, direction)
    return op.Concat(
        op.Sub(op.Mul(first, cos), op.Mul(second, sin)), op.Add(op.Mul(second, cos), op.Mul(first, sin)), axis=-1
    )


def rms_norm(x, weight, eps):
    return op.Mul(weight, op.Div(x, op.Sqrt(with_epsilon(op.ReduceMean(op.Mul(x, x), [-1]), eps))))


def mix(fw, kv, gate, weight, eps):
    return rms_norm(op.Add(kv, op.Mul(op.Sigmoid(gate), op.Sub(fw, kv))), weight, eps)


def cummax(self, dim):
    axes = list(range(len(self.shape)))
    axes[0], axes[dim] = axes[dim], axes[0]
    values, indices = cummax_scan(op.Transpose(self, perm=axes))
    return op.Transpose(values, perm=axes), op.Transpose(indices, perm=axes)


@script(HQLT, default_opset=op)
def cummax_scan(x: N) -> tuple[N, INT64]:
    """Cumulative maxima of x [t, …] and their indices: of equal maxima the last; a NaN stays the maximum."""

    @graph()
    def step(best, where, i, x_t):
        taken = op.Or(x_t >= best, op.Not(x_t == x_t))
        best_t = op.Where(taken, x_t, best)
        where_t = op.Where(taken, i, where)
        next_i = i + 1
        return best_t, where_t, next_i, op.Identity(best_t), op.Identity(where_t)

    first = op.Gather(x, 0, axis=0)
    start = op.Constant(value_int=0)
    _best, _where, _i, values, indices = op.Scan(
        first, op.Expand(start, op.Shape(first)), start, x, body=step, num_scan_inputs=1
    )
    return values, indices


def sort(self, *, stable=None, dim=-1, descending=False):
    """Always stable: of equal numbers, TopK returns the one with the lower index first."""
    size = op.Gather(op.Shape(self), [dim])
    return op.TopK(self, size, axis=dim, largest=int(descending))


def with_epsilon(x, epsilon):
    """x + epsilon. Not as an Add, because onnxscript's optimizer removes an Add of less than 1e-8."""
    return op.Sum(x, op.CastLike(epsilon, x))


def length(x):
    """The size t of x [b, t, …], as a scalar tensor."""
    return op.Squeeze(op.Shape(x, start=1, end=2), [0])


def zeros(x, shape):
    """Zeros in the dtype of x."""
    return op.Expand(op.CastLike(0.0, x), shape)


def resets_or_none(resets, x):
    """`resets`, or Bool[b, t] of False for x [b, t, …] if it is None."""
    return op.Expand(op.Cast(0, to=BOOL.dtype), op.Shape(x, end=2)) if resets is None else resets


def written(live, *tensors):
    """Tensors [b, t, …] with zeros at tokens that are not live."""
    if live is None:
        return tensors
    marks = {axes: op.Unsqueeze(live, list(range(2, axes))) for axes in {len(x.shape) for x in tensors}}
    return tuple(op.Where(marks[len(x.shape)], x, op.CastLike(0.0, x)) for x in tensors)


def grouped(q, k):
    """[b, t, g·h, k] → [b, t, h, g, k]."""
    heads = k.shape[2]
    return op.Reshape(q, op.Constant(value_ints=[0, 0, heads, q.shape[2] // heads, q.shape[3]]))


def ungrouped(x, q, v):
    """[b, t, h, g, v] → [b, t, g·h, v]."""
    return op.Reshape(x, op.Constant(value_ints=[0, 0, q.shape[2], v.shape[3]]))
