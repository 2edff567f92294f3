"""A conversation as tokens: the chat template of a tokenizer, or a plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from hqlt.data import Tokenizer
from hqlt.model import HQLTForCausalLM

Message: TypeAlias = Mapping[str, Any]
"""{"role": "system", "user" or "assistant", "content": its text}"""

PLAIN = (
    "{% for message in messages %}"
    "{{ (message.role | capitalize + ':\\n' if message.role != 'system' else '') + message.content + '\\n\\n' }}"
    "{% endfor %}"
    "{{ 'Assistant:\\n' if add_generation_prompt else '' }}"
)
"""The template for a model that came without one; see `chat_tokens`."""
PLAIN_ENDS = ("\n\nUser:", "\n\nAssistant:")
"""Texts that end an answer in the plain template, in which no token does. They are not part of the answer."""


def chat_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    encode: Callable[[str], list[int]] | None = None,
) -> list[int]:
    """A conversation as the model reads it: the tokenizer's chat template, filled in as transformers does.

    add_generation_prompt: end with what stands before an answer. encode: an `Encoder`, which remembers what it encoded;
    None: the tokenizer. Special tokens that are spelled out in a message are special, as in transformers.

    Where the tokenizer has no chat template, as beside a base model or where tokens are bytes, `plain_template` is its:

        You know Paris well.
                                 (the system message, if there is one)
        User:
        Where is the Louvre?

        Assistant:
        On the right bank.

        User:
        And the Sorbonne?

        Assistant:

    each line ended by a line break, after the special tokens that the tokenizer puts before every text. An answer ends
    there at one of `PLAIN_ENDS`.

    What is appended to a conversation leaves the tokens before it as they are, so that the state after them can be
    reused: in the plain template as far as the tokenizer joins nothing across messages (bytes never do), in another as
    far as the template only appends. Whoever reuses a state compares tokens.

    Raises ValueError for messages that the template refuses.
    """
    untyped: Any = chat_template_utils
    special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    template = tokenizer.chat_template or plain_template(tokenizer)
    try:
        (text,), _ = untyped.render_jinja_template(
            [[dict(message) for message in messages]],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            **{name: tokenizer.spelling(id) for name, id in special.items() if id is not None},
        )
    except (TemplateError, TypeError) as error:  # the template's own words, or an operation that its code cannot do
        raise ValueError(f"messages: expected some that the model's chat template takes, got: {error}") from error
    return encode(text) if encode is not None else tokenizer.encode_prompt(text, add_special_tokens=False)


def plain_template(tokenizer: Tokenizer) -> str:
    """`PLAIN`, after the special tokens that the tokenizer puts before every text."""
    return "".join(map(tokenizer.spelling, tokenizer.prefix_ids)) + PLAIN


def is_plain(tokenizer: Tokenizer) -> bool:
    """Whether the plain template serves: the model came without one, or was exported with this one."""
    return tokenizer.chat_template in (None, plain_template(tokenizer))


def end_tokens(model: HQLTForCausalLM, tokenizer: Tokenizer) -> list[int]:
    """What ends an answer: the tokens that the model's generation config names, and the tokenizer's own."""
    config: Any = model.generation_config
    named = config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return [*dict.fromkeys([*(token for token in named if token is not None), *tokenizer.eos_ids])]
