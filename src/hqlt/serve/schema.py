"""What a request may ask for, in OpenAI's names. Anything else is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none",),
    "store": (False,), "service_tier": ("auto", "default"), "modalities": (["text"],),
}  # fmt: skip
"""Fields that are not supported, and values of theirs that ask for nothing."""

Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Body(BaseModel):
    """A null stands for a field that is not given, as the clients of OpenAI send it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def without_what_asks_for_nothing(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {
            name: value for name, value in given.items() if value is not None and value not in NEUTRAL.get(name, ())
        }


class StreamOptions(Body):
    include_usage: bool = False
    """A last chunk with `usage` and no choices."""


class Asked(Body):
    """What both kinds of requests have in common."""

    model: str
    """As /v1/models names it."""
    n: int = Field(1, ge=1)
    """Continuations."""
    max_tokens: int | None = Field(None, ge=1)
    """Of each continuation."""
    temperature: float = Field(1.0, ge=0, le=2)
    """0: always the likeliest token."""
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    """The same text for the same seed."""
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = []
    """Texts that end a continuation, and are not part of it."""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    """Has no effect."""

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are wanted beside each; None: no log p."""
        raise NotImplementedError


class CompletionAsked(Asked):
    prompt: str | Annotated[list[int], Field(min_length=1)] | Annotated[list[str], Field(min_length=1, max_length=1)]
    """A text, or tokens."""
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def text(self) -> str | None:
        """None where the prompt is tokens."""
        first = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        return first if isinstance(first, str) else None

    @property
    def tokens(self) -> list[int]:
        """Empty where the prompt is a text."""
        return [] if self.text is not None else [token for token in self.prompt if isinstance(token, int)]

    @property
    def top(self) -> int | None:
        return self.logprobs


class Part(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatAsked(Asked):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    """OpenAI's newer name of max_tokens."""
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @property
    def top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None
