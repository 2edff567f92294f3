"""The fields of a request, by OpenAI's names. All other fields are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none",),
    "store": (False,), "service_tier": ("auto", "default"), "modalities": (["text"],),
}  # fmt: skip
"""Unsupported fields, and their values that have no effect, which are accepted."""

Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Body(BaseModel):
    """A JSON object. As in OpenAI's API, null is the same as an absent field."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_fields_without_effect(cls, body: Any) -> Any:
        if not isinstance(body, Mapping):
            return body
        return {name: value for name, value in body.items() if value is not None and value not in NEUTRAL.get(name, ())}


class StreamOptions(Body):
    include_usage: bool = False
    """Whether the stream ends with a chunk that has `usage` and no choices."""


class RequestBody(Body):
    """The fields that chat and text completions share."""

    model: str
    """The name in /v1/models."""
    n: int = Field(1, ge=1)
    """Number of continuations."""
    max_tokens: int | None = Field(None, ge=1)
    """Maximum length of each continuation."""
    temperature: float = Field(1.0, ge=0, le=2)
    """0 chooses the most likely token."""
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    """The same seed gives the same text."""
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = []
    """Strings that end a continuation; they are not part of it."""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    """Has no effect."""

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def num_logprobs(self) -> int | None:
        """Number of most likely tokens reported with each token; None for no log probabilities."""
        raise NotImplementedError


class CompletionRequest(RequestBody):
    prompt: str | Annotated[list[int], Field(min_length=1)] | Annotated[list[str], Field(min_length=1, max_length=1)]
    """A text, or token ids."""
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def text(self) -> str | None:
        """The prompt as text; None if it is token ids."""
        first = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        return first if isinstance(first, str) else None

    @property
    def tokens(self) -> list[int]:
        """The prompt as token ids; empty if it is a text."""
        return [] if self.text is not None else [token for token in self.prompt if isinstance(token, int)]

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class Part(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def for_template(self) -> dict[str, str]:
        """The message as chat templates expect it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(RequestBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    """OpenAI's newer name for max_tokens."""
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None
