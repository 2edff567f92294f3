"""What the engine's thread says arrives in the event loop, in order and whole."""

from __future__ import annotations

import asyncio

import pytest

from hqlt.data import load_tokenizer
from hqlt.serve.answer import Answer, Outbox
from hqlt.serve.text import StoppedText

BYTES = load_tokenizer("bytes")


def test_what_came_before_an_error_is_not_lost():
    async def heard():
        answer, texts = Answer(Outbox(), BYTES, [1], (), 1), []
        for token in b"ab":
            assert not answer.token(0, token, None)
        answer.failed(RuntimeError("at last"))
        try:
            async for pieces in answer:
                texts += [piece.text for piece in pieces]
        except RuntimeError as error:
            texts.append(str(error))
        return texts

    assert asyncio.run(heard()) == ["a", "b", "at last"]


def test_pieces_of_a_thread_come_in_order():
    async def heard():
        answer = Answer(Outbox(), BYTES, [1], (), 2)

        def speak():
            for token in b"0123456789" * 20:
                answer.token(token % 2, token, None)
            answer.ended(1, "length")
            answer.ended(0, "stop")

        speaking = asyncio.get_running_loop().run_in_executor(None, speak)
        pieces = [piece async for some in answer for piece in some]
        await speaking
        return pieces, answer.completion_tokens

    pieces, count = asyncio.run(heard())
    assert count == 200
    for choice, reason in enumerate(("stop", "length")):
        own = [piece for piece in pieces if piece.choice == choice]
        assert "".join(piece.text for piece in own) == ("02468" if choice == 0 else "13579") * 20
        assert [piece.reason for piece in own if piece.reason] == [reason] == [own[-1].reason]


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
    stopped, out = StoppedText(BYTES, [], stops), ""
    for token in text.encode():
        more, ended = stopped.add(token)
        out += more
        assert expected.startswith(out)  # nothing that would have to be taken back
        if ended:
            break
    assert out + stopped.end() == expected
    assert stopped.end() == "" or not ended
