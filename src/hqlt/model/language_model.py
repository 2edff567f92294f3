"""The language model, as a model of transformers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hqlt.layer import HybridMemory, RMSNorm, ShortConvolution, SwiGLU, ZeroCenteredRMSNorm
from hqlt.memory import FWMemory, KVMemory, MemoryState
from hqlt.memory.fw import LearnedMap
from hqlt.mixer import Mixer
from hqlt.model.block import HQLTBlock
from hqlt.model.cache import CACHE, HQLTCache, cache_argument
from hqlt.model.config import HQLTConfig
from hqlt.model.generation import HQLTGenerationMixin
from hqlt.model.loss import IGNORE, summed_cross_entropy
from hqlt.model.rollback import Columns
from hqlt.model.segments import Segments, read_rows, read_segments, segment_starts
from hqlt.shapes import Hidden, Positions, Resets

ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache",
    "inputs_embeds",
    "labels",
    "use_cache",
    "resets",
    "logits_to_keep",
    "shift_labels",
    "skip_logits",
    "output_hidden_states",
    "return_dict",
)
PACKING = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx"})


class HQLTPreTrainedModel(PreTrainedModel):
    """Base class: config, initialization and the attributes that transformers expects."""

    config_class = HQLTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HQLTBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Initialize a module without parameters of its own even if it is custom code.

        transformers skips custom modules whose own parameters were all loaded. That includes modules without any, such
        as a mixer, which sets the initial values of the gates inside it.
        """
        owns = next(module.parameters(recurse=False), None) is not None
        super()._initialize_weights(module, is_custom_code and owns)

    def _init_weights(self, module: nn.Module) -> None:
        """Linear maps and embeddings: normal(0, initializer_range). Norms: 1. Convolutions: by `conv_init`."""
        super()._init_weights(module)
        if isinstance(module, ZeroCenteredRMSNorm):
            nn.init.zeros_(module.weight)
        elif isinstance(module, (FWMemory, KVMemory, LearnedMap, Mixer)):
            module.init_parameters()
        elif isinstance(module, ShortConvolution):
            if self.config.conv_init == "identity":
                nn.init.zeros_(module.weight)
                nn.init.ones_(module.weight[:, -1])
            else:
                bound = 1 / math.sqrt(module.size)
                nn.init.uniform_(module.weight, -bound, bound)


class HQLTModel(HQLTPreTrainedModel):
    """The model without an output head: embeddings, blocks and a final norm.

    Args:
        config: sizes of the model and the memories of its layers.

    Source:
        Irie et al. 2025 (arXiv 2506.00744), section 4.1.

    Example:
        >>> import torch
        >>> from hqlt.model import HQLTModel, preset
        >>> model = HQLTModel(preset("tiny"))
        >>> list(model(torch.tensor([[72, 105]])).last_hidden_state.shape)
        [1, 2, 192]
    """

    def __init__(self, config: HQLTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(build_block(config, layer) for layer in range(config.num_hidden_layers))
        norm = ZeroCenteredRMSNorm if config.zero_centered_block_norms else RMSNorm
        self.norm = norm(config.hidden_size, eps=config.norm_eps)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Maps that write to the residual stream: Kaiming-uniform(a=√5), i.e. ±1/√inputs, divided by √(2·layers)."""
        super()._init_weights(module)
        for block in self.layers:
            if isinstance(block, HQLTBlock) and isinstance(module, nn.Linear) and module in block.residual_writers():
                bound = 1 / math.sqrt(module.in_features * 2 * len(self.layers))
                nn.init.uniform_(module.weight, -bound, bound)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HQLTCache | None = None,
        inputs_embeds: Hidden | None = None,
        use_cache: bool | None = None,
        resets: Resets | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: HQLTCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Read tokens.

        Args:
            input_ids ([b, t]): the tokens.
            attention_mask ([b, past + t]): 1 for a token, 0 for padding. Padding may stand anywhere and never enters a
                memory. The first token of a row begins a segment.
            position_ids ([b, t] or [1, t]): a segment begins where it is 0. Ignored if resets are given.
            past_key_values: the cache that an earlier call returned. It is updated in place.
            inputs_embeds ([b, t, d]): embeddings, instead of input_ids.
            use_cache: whether to return a cache. Default: as in the config.
            resets (bool, [b, t]): a segment begins where it is True.
            output_hidden_states: whether to return the hidden states before each block too.
            return_dict: whether to return an output object instead of a tuple. Default: as in the config.
            cache: the same as past_key_values; the name of transformers from 5.24 on.
            **kwargs: ignored, unless one looks like a misspelled argument.

        Returns:
            The hidden states after the final norm, [b, t, d], and the cache.

        Raises:
            ValueError: when shapes do not match, or the mask differs from what the cache has read.
            TypeError: for another type of cache or a misspelled argument.
        """
        refuse_misspelt(kwargs, packed=position_ids is not None or resets is not None)
        x = self._embed(input_ids, inputs_embeds)
        memory = self._cache(cache_argument(past_key_values, cache), use_cache)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden = self._read(x, memory, bool(wanted), attention_mask, position_ids, resets)
        optional: Any = {CACHE: memory, "hidden_states": tuple(hidden) if wanted else None}
        output = BaseModelOutputWithPast(last_hidden_state=hidden[-1], **optional)
        return output if _as_dict(return_dict, self.config) else output.to_tuple()

    def _read(
        self,
        x: Hidden,
        memory: HQLTCache | None,
        wanted: bool,
        attention_mask: Tensor | None,
        position_ids: Positions | None,
        resets: Resets | None,
    ) -> list[Hidden]:
        """The hidden states [b, t, d]: before each block if `wanted`, and after the final norm.

        A cache with rollback is updated in two steps, so that it holds the state from `rollback` columns ago.
        """
        n, t = memory.rollback if memory is not None else 0, x.shape[1]
        if n == 0:
            segments = self._segments(x, memory, attention_mask, position_ids, resets)
            return self._read_segments(x, memory, wanted, segments)
        if n < t:  # check all inputs before a part of them is read
            self._segments(x, memory, attention_mask, position_ids, resets)
        parts = []
        for begin, end in pairwise([0, t - n, t] if n < t else [0, t]):
            mask = None if attention_mask is None else attention_mask[:, : attention_mask.shape[1] - (t - end)]
            positions, marks = (None if part is None else part[:, begin:end] for part in (position_ids, resets))
            part = x[:, begin:end]
            segments = self._segments(part, memory, mask, positions, marks)
            columns = Columns.of(part, segment_starts(part.shape[0], part.shape[1], positions, marks))
            parts.append(self._read_segments(part, memory, wanted, segments, columns))
        return parts[0] if len(parts) == 1 else [torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)]

    def _read_segments(
        self, x: Hidden, memory: HQLTCache | None, wanted: bool, segments: Segments, columns: Columns | None = None
    ) -> list[Hidden]:
        def read(
            x: Hidden, resets: Resets | None, states: Sequence[MemoryState]
        ) -> tuple[list[Hidden], list[MemoryState]]:
            hidden, after = [], []
            for block, state in zip(self.layers, states, strict=True):
                if wanted:
                    hidden.append(x)
                x, state = block(x, resets, state)
                if memory is not None:
                    after.append(state)
            return [*hidden, self.norm(x)], after

        before: Any = memory.states if memory is not None and memory.states else (None,) * len(self.layers)
        hidden, after = read_rows(read, segments.sort(x), segments, before)
        if memory is not None:
            memory.advance(after, x.shape[1], segments.tokens, columns, self)
        return [segments.restore(x) for x in hidden]

    def _segments(
        self,
        x: Hidden,
        memory: HQLTCache | None,
        attention_mask: Tensor | None,
        position_ids: Positions | None,
        resets: Resets | None,
    ) -> Segments:
        """How the columns are read. Also checks that the mask agrees with what the cache has read."""
        b, t = x.shape[:2]
        if memory is None or not memory.states:
            return read_segments(b, t, None, attention_mask, position_ids, resets)
        if attention_mask is None:
            if memory.attention_mask is None:
                return read_segments(b, t, 0, None, position_ids, resets)
            attention_mask = torch.cat([memory.attention_mask, memory.attention_mask.new_ones(b, t)], dim=1)
        segments = read_segments(b, t, memory.seen_tokens, attention_mask, position_ids, resets)
        memory.check_past(attention_mask)
        return segments

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Hidden | None) -> Hidden:
        if inputs_embeds is not None and input_ids is None:
            return inputs_embeds
        if input_ids is None or inputs_embeds is not None:
            both = "neither" if input_ids is None else "both"
            raise ValueError(f"input_ids, inputs_embeds: expected exactly one of them, got {both}")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: expected [b, t], got shape {list(input_ids.shape)}")
        embedded: Hidden = self.embed_tokens(input_ids)
        return embedded

    def _cache(self, given: HQLTCache | None, use_cache: bool | None) -> HQLTCache | None:
        if given is None:
            return HQLTCache() if (self.config.use_cache if use_cache is None else use_cache) else None
        if given.states and len(given.states) != len(self.layers):
            raise ValueError(
                f"past_key_values: expected one state for each of the {len(self.layers)} layers, got "
                f"{len(given.states)}; is it the cache of another model?"
            )
        return given


class HQLTForCausalLM(HQLTPreTrainedModel, HQLTGenerationMixin):
    """A causal language model: `HQLTModel` with an output head over the vocabulary.

    Args:
        config: sizes of the model and the memories of its layers.

    Example:
        >>> import torch
        >>> from hqlt.model import HQLTForCausalLM, preset
        >>> model, tokens = HQLTForCausalLM(preset("tiny")), torch.tensor([[72, 101, 108, 108, 111]])
        >>> model(tokens, labels=tokens).loss.backward()
        >>> model.generate(tokens, max_new_tokens=3).shape
        torch.Size([1, 8])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HQLTConfig) -> None:
        super().__init__(config)
        self.model = HQLTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HQLTCache | None = None,
        inputs_embeds: Hidden | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        resets: Resets | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: HQLTCache | None = None,
        shift_labels: Tensor | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Predict the next token at each position.

        Args:
            input_ids ([b, t]): the tokens.
            attention_mask ([b, past + t]): see `HQLTModel.forward`.
            position_ids ([b, t] or [1, t]): see `HQLTModel.forward`.
            past_key_values: see `HQLTModel.forward`.
            inputs_embeds ([b, t, d]): embeddings, instead of input_ids.
            labels ([b, t]): usually equal to input_ids, because they are shifted here. Positions with label -100 are
                not scored. Set the first label of each packed document to -100, or it is predicted from the document
                before.
            use_cache: see `HQLTModel.forward`.
            resets (bool, [b, t]): see `HQLTModel.forward`.
            logits_to_keep: compute only the last n logits (0: all), or those at these indices.
            output_hidden_states: see `HQLTModel.forward`.
            return_dict: see `HQLTModel.forward`.
            cache: see `HQLTModel.forward`.
            shift_labels ([b, t]): labels that are shifted already.
            skip_logits: return only the loss, and compute it in chunks of positions (`hqlt.model.loss`). With a large
                vocabulary, the logits need more memory than the rest of a training step.
            **kwargs: num_items_in_batch divides the summed loss when gradients are accumulated. Others: see
                `HQLTModel.forward`.

        Returns:
            The loss (with labels), the logits [b, t, vocabulary] and the cache.

        Raises:
            ValueError: when labels are combined with logits_to_keep, or skip_logits is given without labels; and as
                `HQLTModel.forward` does.
        """
        given = labels if shift_labels is None else shift_labels
        if given is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("logits_to_keep: expected 0 with labels, because all positions are scored")
        if given is None and skip_logits:
            raise ValueError("skip_logits: expected labels (or shift_labels), got none; without them there is no loss")
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            resets=resets,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        loss, logits = None, None
        if not skip_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(output.last_hidden_state[:, keep])
        if given is not None:
            options = {"labels": given, "shift_labels": shift_labels, "vocab_size": self.config.vocab_size, **kwargs}
            read = output.last_hidden_state
            loss = self.loss_function(logits, **options) if logits is not None else self._loss_alone(read, **options)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=output.hidden_states, **{CACHE: getattr(output, CACHE)}
        )
        return result if _as_dict(return_dict, self.config) else result.to_tuple()

    def _loss_alone(
        self,
        x: Hidden,
        labels: Tensor,
        shift_labels: Tensor | None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The same loss as `loss_function`, computed in chunks of positions."""
        targets = F.pad(labels, (0, 1), value=IGNORE)[:, 1:] if shift_labels is None else shift_labels
        scored = (targets != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        return summed_cross_entropy(x, self.lm_head, targets) / scored


def build_block(config: HQLTConfig, layer: int) -> HQLTBlock:
    """Build the block of a layer."""
    assert config.intermediate_size is not None, "the config sets it"
    mlp = SwiGLU(config.hidden_size, config.intermediate_size, config.mlp_bias)
    return HQLTBlock(HybridMemory(**config.layer_options(layer)), mlp, **config.block_options(layer))


def refuse_misspelt(kwargs: dict[str, Any], packed: bool) -> None:
    """Ignore unknown arguments, which transformers' callers add, unless one looks like ours or marks packed documents.

    Raises:
        TypeError: for a cache under another name, or a misspelled argument.
        ValueError: when packed documents are marked only by an argument that this model does not read.
    """
    for name, value in kwargs.items():
        if isinstance(value, Cache):
            raise TypeError(f"forward: expected a cache as past_key_values (or cache), got it as {name!r}")
        near = difflib.get_close_matches(name, ARGUMENTS, n=1, cutoff=0.85)
        if near:
            raise TypeError(f"forward: expected a known argument, got {name!r}; did you mean {near[0]!r}?")
        if name in PACKING and not packed:
            raise ValueError(
                f"{name}: expected packed documents to be marked by `position_ids` (0 where one begins) or `resets`, "
                f"got only {name}, which this model does not read"
            )


def _as_dict(return_dict: bool | None, config: PreTrainedConfig) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)
