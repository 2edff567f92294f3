"""Rendering conversations as tokens, by a tokenizer's chat template or a plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from hqlt.data import Tokenizer
from hqlt.model import HQLTForCausalLM

Message: TypeAlias = Mapping[str, Any]
"""{"role": "system", "user" or "assistant", "content": text}"""

PLAIN = (
    "{% for message in messages %}"
    "{{ (message.role | capitalize + ':\\n' if message.role != 'system' else '') + message.content + '\\n\\n' }}"
    "{% endfor %}"
    "{{ 'Assistant:\\n' if add_generation_prompt else '' }}"
)
"""Template for models without one; see `chat_tokens`."""
PLAIN_ENDS = ("\n\nUser:", "\n\nAssistant:")
"""Texts that end an answer in the plain template, which has no end token. They are not part of the answer."""


def chat_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    encode: Callable[[str], list[int]] | None = None,
) -> list[int]:
    """Render a conversation as tokens by the tokenizer's chat template, as transformers does.

    Special tokens spelled out in a message are encoded as special tokens, as in transformers. Tokenizers without a chat
    template, such as those of base models or bytes, use `plain_template`:

        You know Paris well.
                                 (that was the system message, if there is one)
        User:
        Where is the Louvre?

        Assistant:
        On the right bank.

        User:
        And the Sorbonne?

        Assistant:

    with a line break after each line, preceded by the special tokens that the tokenizer puts before every text. There,
    an answer ends at one of `PLAIN_ENDS`.

    Appending messages usually keeps all earlier tokens, so that the state after them can be reused. This does not hold
    for templates that rewrite earlier messages, or tokenizers that merge characters across messages. Callers that reuse
    a state must compare tokens.

    Args:
        tokenizer: the model's tokenizer.
        messages: the conversation.
        add_generation_prompt: whether to append the beginning of an answer.
        encode: encodes the rendered text, such as a `CachedEncoder`. Default: the tokenizer.

    Returns:
        Token ids.

    Raises:
        ValueError: when the template rejects the messages.
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
    except (TemplateError, TypeError) as error:  # raised by the template, or by an unsupported operation in it
        raise ValueError(f"messages: expected messages that the chat template accepts, got: {error}") from error
    return encode(text) if encode is not None else tokenizer.encode_prompt(text, add_special_tokens=False)


def plain_template(tokenizer: Tokenizer) -> str:
    """`PLAIN`, preceded by the special tokens that the tokenizer puts before every text."""
    return "".join(map(tokenizer.spelling, tokenizer.prefix_ids)) + PLAIN


def is_plain(tokenizer: Tokenizer) -> bool:
    """Whether the plain template is used: the tokenizer has no template, or was exported with the plain one."""
    return tokenizer.chat_template in (None, plain_template(tokenizer))


def end_tokens(model: HQLTForCausalLM, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer: those of the generation config and those of the tokenizer."""
    config: Any = model.generation_config
    named = config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return [*dict.fromkeys([*(token for token in named if token is not None), *tokenizer.eos_ids])]
