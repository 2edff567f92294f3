from __future__ import annotations

import threading

import pytest
import torch

from hqlt import checked, ops
from hqlt.ops.backend import IMPLEMENTATIONS, forced
from hqlt.shapes import checks_finite


@pytest.mark.parametrize("op", ["delta_rule", "linear_attention", "window_attention", "synchronous"])
@pytest.mark.parametrize("t", [0, 1, 200])
def test_the_choice_is_an_implementation_and_has_a_reason(op, t):
    options = {"window": 8} if op == "window_attention" else {}
    choice = ops.explain(op, torch.zeros(1, t, 2, 4), **options)
    assert choice.name in IMPLEMENTATIONS[op]
    assert choice.why


def test_a_named_backend_wins_over_a_forced_one():
    q = torch.zeros(1, 9, 2, 4)
    with ops.use_backend("reference"):
        assert ops.explain("delta_rule", q).name == "reference"
        assert ops.explain("delta_rule", q, backend="chunked").name == "chunked"
    assert ops.explain("delta_rule", q).why != "forced by hqlt.ops.use_backend"


def test_the_forced_backend_ends_with_its_context_even_after_an_error():
    q = torch.zeros(1, 9, 2, 4)
    before = ops.explain("delta_rule", q)
    with pytest.raises(RuntimeError), ops.use_backend("reference"):
        raise RuntimeError
    assert ops.explain("delta_rule", q) == before


def test_unknown_operation_is_named():
    with pytest.raises(ValueError, match=r"op: expected one of 'delta_rule'.*got 'attention'"):
        ops.explain("attention", torch.zeros(1, 1, 1, 1))


def test_an_unknown_name_is_refused_before_anything_runs():
    with pytest.raises(
        ValueError, match=r"backend: expected one of 'blocked', .*got 'refrence'; did you mean 'reference'"
    ):
        ops.use_backend("refrence")


def test_two_threads_do_not_see_each_others_settings():
    """With a process-wide variable, the last thread to leave its context would restore the other thread's setting."""
    seen, turn = {}, threading.Barrier(2, timeout=30)

    def run(name):
        seen[name, "before"] = forced(), checks_finite()
        turn.wait()
        with ops.use_backend(name), checked(name == "reference"):
            turn.wait()
            seen[name, "within"] = forced(), checks_finite()
            turn.wait()
        seen[name, "after"] = forced(), checks_finite()

    with ops.use_backend("chunked"), checked():
        threads = [threading.Thread(target=run, args=(name,)) for name in ("reference", "native")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (forced(), checks_finite()) == ("chunked", True)
    for name in ("reference", "native"):
        assert seen[name, "before"] == seen[name, "after"] == (None, False)
        assert seen[name, "within"] == (name, name == "reference")
    assert (forced(), checks_finite()) == (None, False)


def test_a_compiled_function_follows_the_settings():
    @torch.compile(fullgraph=True, backend="eager")
    def read(x):
        return x + (1 if forced() is None else 2)

    zero = torch.zeros(1)
    assert read(zero).item() == 1
    with ops.use_backend("reference"):
        assert read(zero).item() == 2
    assert read(zero).item() == 1
