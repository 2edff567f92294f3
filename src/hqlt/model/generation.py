"""transformers' `generate` with an `HQLTCache`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.stopping_criteria import StoppingCriteriaList

from hqlt.model.cache import CACHE, HQLTCache, cache_argument

NEVER = torch.iinfo(torch.long).max


class HQLTGenerationMixin(GenerationMixin):
    """transformers' `generate` with an `HQLTCache`. The states of rows that end early do not change any more."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate tokens, as in transformers. Padding after a row has ended does not change its memories.

        Args:
            inputs ([b, t]): the prompts, padded on the left. With a cache: the whole text, or only the unread tokens
                together with an attention_mask over all. The first unread token can be the last one of an earlier
                result, because `generate` does not read the last token that it produces.
            *args: as in transformers.
            **kwargs: as in transformers. past_key_values (or cache) is an `HQLTCache` with what has been read already.

        Returns:
            As in transformers.

        Raises:
            ValueError: when the prompt has no unread token, or the attention mask differs from what the cache has read.
        """
        given = cache_argument(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if given is not None:
            kwargs[CACHE] = given
            if given.states:
                prompt = next(
                    x for x in (inputs, kwargs.get("inputs_embeds"), kwargs.get("input_ids")) if x is not None
                )
                check_unread(given, prompt.shape[1], kwargs.get("attention_mask"))
        if getattr(kwargs.get("generation_config"), "is_assistant", False) and kwargs.get("attention_mask") is None:
            # transformers would mask generated tokens that equal the padding token. There is no padding here.
            kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"] if inputs is None else inputs)
        theirs: Any = super()
        return theirs.generate(inputs, *args, **kwargs)

    def _sample(  # type: ignore[override]  # *args and **kwargs, so that it works with more versions of transformers
        self, input_ids: Tensor, *args: Any, stopping_criteria: StoppingCriteriaList, **kwargs: Any
    ) -> Any:
        ended = EndedRows(stopping_criteria)
        theirs: Any = super()
        return theirs._sample(input_ids, *args, stopping_criteria=ended, ended=ended, **kwargs)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` inspects its signature
    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *args: Any,
        attention_mask: Tensor | None = None,
        ended: EndedRows | None = None,
        **kwargs: Any,
    ) -> Any:
        # As in transformers, but padding after ended rows is masked, and columns that the cache has read are not passed
        # again, as the first step of assisted generation would do.
        cache, whole = kwargs.get(CACHE), attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
        if ended is not None:
            attention_mask = ended.mask(input_ids, attention_mask, cache)
        elif cache is not None and whole and kwargs.get("next_sequence_length", args or None) is None:
            kwargs["next_sequence_length"] = input_ids.shape[1] - cache.seen_tokens
        theirs: Any = super()
        return theirs.prepare_inputs_for_generation(input_ids, *args, attention_mask=attention_mask, **kwargs)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Return the mask unchanged: the model does not use the [b, 1, t, l] masks of transformers."""
        return attention_mask

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Start with an `HQLTCache`. Refuse other cache implementations and right-padded prompts."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: expected None, because this model's memories have one static shape, got "
                f"{generation_config.cache_implementation!r}"
            )
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not mask[:, -1].all():
            raise ValueError(
                "attention_mask: expected every prompt to end with a token, got right padding, after which generate "
                "would continue; pad on the left (tokenizer.padding_side = 'left')"
            )
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = HQLTCache()
        if generation_config.is_assistant:  # rejected draft tokens are removed from the assistant's cache
            model_kwargs[CACHE].activate_past_recording()


class EndedRows(StoppingCriteriaList):
    """The stopping criteria of a call of `generate`. It also records where each row ended."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)  # without eos, no row is padded
        self.ends: Tensor | None = None  # [b] length of each row at its end, or NEVER; None: no row has ended

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended: Tensor = super().__call__(input_ids, scores, **kwargs)
        if self.pads and (self.ends is not None or ended.any()):
            ends = torch.where(ended, input_ids.shape[1], NEVER)
            self.ends = ends if self.ends is None else ends.minimum(self.ends)
        return ended

    def mask(self, input_ids: Tensor, attention_mask: Tensor | None, cache: HQLTCache | None) -> Tensor | None:
        """The attention mask for input_ids, [b, l], with 0 for the padding after ended rows."""
        if self.ends is None:
            return attention_mask
        padding = (input_ids.shape[1] - self.ends).clamp(min=0)
        if attention_mask is not None:
            width = attention_mask.shape[1]
        else:
            width = cache.seen_tokens + 1 if cache is not None else input_ids.shape[1]
        tokens = torch.arange(width, device=padding.device) < width - padding[:, None]
        return tokens if attention_mask is None else attention_mask * tokens


def check_unread(cache: HQLTCache, tokens: int, attention_mask: Tensor | None) -> None:
    """Refuse a prompt, of this many tokens per row, that does not continue what the cache has read."""
    seen, columns = cache.seen_tokens, tokens if attention_mask is None else attention_mask.shape[1]
    if columns <= seen or columns not in (tokens, seen + tokens):
        raise ValueError(
            f"past_key_values: expected a prompt with tokens that the cache has not read, after the {seen} columns "
            f"that it has read, got {tokens} tokens and an attention mask over {columns}; pass the whole text with at "
            f"least one new token, or only the new tokens with an attention_mask over [b, {seen} + new]. (To restart "
            f"from the last token, keep a `cache.fork()` from before it.)"
        )
    if attention_mask is not None:
        cache.check_past(attention_mask.repeat_interleave(cache.batch_size // len(attention_mask), dim=0))
    elif cache.attention_mask is not None:
        raise ValueError(
            "attention_mask: expected one, because the cache has read padding, got None; pass "
            "torch.cat([cache.attention_mask, new_columns], dim=1)"
        )
