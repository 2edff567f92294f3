"""Events of the engine's thread arrive in the event loop complete and in order."""

from __future__ import annotations

import asyncio

import pytest

from hqlt.data import load_tokenizer
from hqlt.serve.stream import Outbox, ResponseStream
from hqlt.serve.text import StopTextStream

BYTES = load_tokenizer("bytes")


def test_text_before_an_error_is_not_lost():
    async def received():
        stream, texts = ResponseStream(Outbox(), BYTES, [1], (), 1), []
        for token in b"ab":
            assert not stream.on_token(0, token, None)
        stream.on_error(RuntimeError("at last"))
        try:
            async for deltas in stream:
                texts += [delta.text for delta in deltas]
        except RuntimeError as error:
            texts.append(str(error))
        return texts

    assert asyncio.run(received()) == ["a", "b", "at last"]


def test_deltas_of_a_thread_arrive_in_order():
    async def received():
        stream = ResponseStream(Outbox(), BYTES, [1], (), 2)

        def generate():
            for token in b"0123456789" * 20:
                stream.on_token(token % 2, token, None)
            stream.on_end(1, "length")
            stream.on_end(0, "stop")

        generating = asyncio.get_running_loop().run_in_executor(None, generate)
        deltas = [delta async for some in stream for delta in some]
        await generating
        return deltas, stream.completion_tokens

    deltas, count = asyncio.run(received())
    assert count == 200
    for choice, reason in enumerate(("stop", "length")):
        own = [delta for delta in deltas if delta.choice == choice]
        assert "".join(delta.text for delta in own) == ("02468" if choice == 0 else "13579") * 20
        assert [delta.finish_reason for delta in own if delta.finish_reason] == [reason] == [own[-1].finish_reason]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("one STO two", ["STOP"], "one STO two"),
        ("one STO", ["STOP"], "one STO"),
        ("aab", ["ab"], "a"),
        ("abcabd", ["abd", "bca"], "a"),
        ("xyz", ["yz", "z"], "x"),
        ("ä€🙂 end", ["🙂"], "ä€"),
        ("no stops", [], "no stops"),
        ("", ["a"], ""),
    ],
)
def test_a_text_ends_before_its_first_stop_string(text, stops, expected):
    stream, out = StopTextStream(BYTES, [], stops), ""
    for token in text.encode():
        more, stopped = stream.add(token)
        out += more
        assert expected.startswith(out)  # nothing that would have to be retracted
        if stopped:
            break
    assert out + stream.end() == expected
    assert stream.end() == "" or not stopped
