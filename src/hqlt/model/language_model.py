"""The language model, in the shape that transformers gives to one."""

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
from hqlt.model.cache import CACHE, HQLTCache, one_cache
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
    config_class = HQLTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HQLTBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Of code that is not its own, transformers passes over modules whose own parameters were all read from a file:
        over those without any, too, such as a mixer, which says where the gates that it holds begin.
        """
        owns = next(module.parameters(recurse=False), None) is not None
        super()._initialize_weights(module, is_custom_code and owns)

    def _init_weights(self, module: nn.Module) -> None:
        """Linear maps and embeddings normal(0, initializer_range), norms 1, convolutions as `conv_init` says."""
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
    """Embeddings, blocks, a final norm: tokens → hidden states.

    Source: the paper, section 4.1.
    """

    def __init__(self, config: HQLTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(build_block(config, layer) for layer in range(config.num_hidden_layers))
        norm = ZeroCenteredRMSNorm if config.zero_centered_block_norms else RMSNorm
        self.norm = norm(config.hidden_size, eps=config.norm_eps)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """What writes to the residual stream: Kaiming-uniform(a=√5), that is ±1/√inputs, divided by √(2·layers)."""
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
        """The normed hidden states of the last block, [b, t, d], and the memories after the last token.

        input_ids: [b, t], or inputs_embeds: [b, t, d]. past_key_values, or cache (transformers' name for it from 5.24
        on): what an earlier call returned or was given; it is brought up to date in place. use_cache: whether to
        return one (None: as the config says).

        Segments begin where resets, Bool[b, t], is True; without it, where position_ids, [b, t] or [1, t], is 0. With
        attention_mask, [b, past + t], a row's first real token begins one, and padding is remembered nowhere, wherever
        it stands. The same in training and in evaluation.

        Raises ValueError for shapes that do not fit and for a mask that says of the past something else than what the
        cache has read, TypeError for another kind of cache or a misspelt argument.
        """
        refuse_misspelt(kwargs, packed=position_ids is not None or resets is not None)
        x = self._embed(input_ids, inputs_embeds)
        memory = self._cache(one_cache(past_key_values, cache), use_cache)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden = self._read(x, memory, bool(wanted), attention_mask, position_ids, resets)
        named: Any = {CACHE: memory, "hidden_states": tuple(hidden) if wanted else None}
        output = BaseModelOutputWithPast(last_hidden_state=hidden[-1], **named)
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
        """The hidden states [b, t, d] before each block where they are wanted, and after the last, normed.

        The memory is brought up to date: at once, or in two steps, so that it has a state from `rollback` columns ago.
        """
        n, t = memory.rollback if memory is not None else 0, x.shape[1]
        if n == 0:
            segments = self._segments(x, memory, attention_mask, position_ids, resets)
            return self._read_segments(x, memory, wanted, segments)
        if n < t:  # what does not fit is refused before a part of it is read
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
        """How the columns are read; a mask over the past must say what the cache remembers."""
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
            raise ValueError(f"expected either input_ids or inputs_embeds, got {both}")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: expected [b, t], got shape {list(input_ids.shape)}")
        embedded: Hidden = self.embed_tokens(input_ids)
        return embedded

    def _cache(self, given: HQLTCache | None, use_cache: bool | None) -> HQLTCache | None:
        if given is None:
            return HQLTCache() if (self.config.use_cache if use_cache is None else use_cache) else None
        if given.states and len(given.states) != len(self.layers):
            raise ValueError(
                f"past_key_values: expected a state for each of the {len(self.layers)} layers, got "
                f"{len(given.states)}; is it the cache of another model?"
            )
        return given


class HQLTForCausalLM(HQLTPreTrainedModel, HQLTGenerationMixin):
    """`HQLTModel` and a head over the vocabulary: tokens → logits of the next token.

    >>> model = HQLTForCausalLM(hqlt.preset("tiny"))
    >>> model(tokens, labels=tokens).loss
    >>> model.generate(tokens, max_new_tokens=20)
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
        """Logits [b, t, vocabulary] of the token after each; the rest as in `HQLTModel.forward`.

        labels: [b, t], in the convention of transformers: labels[:, i] is the token at i, the shift by one happens
        here, -100 is not scored. A document's first token is predicted from the document before it, as in every model
        of transformers: give it the label -100 to leave it out. shift_labels: labels that are shifted already.
        num_items_in_batch (among kwargs) divides the summed loss where gradients are accumulated. skip_logits: return
        the loss alone, and compute it a chunk of positions at a time (`hqlt.model.loss`): logits of a large vocabulary
        take more memory than the rest of a step. logits_to_keep: the last n positions only (0: all), or their indices.
        """
        given = labels if shift_labels is None else shift_labels
        if given is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels: expected logits_to_keep = 0 beside them, because all positions are scored")
        if given is None and skip_logits:
            raise ValueError("skip_logits: expected labels (or shift_labels) beside it, got none, and so no loss")
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
        """`loss_function` of the head's logits, which are never all there."""
        targets = F.pad(labels, (0, 1), value=IGNORE)[:, 1:] if shift_labels is None else shift_labels
        scored = (targets != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        return summed_cross_entropy(x, self.lm_head, targets) / scored


def build_block(config: HQLTConfig, layer: int) -> HQLTBlock:
    """The block of a layer, whose memories are of its kind."""
    assert config.intermediate_size is not None, "the config sets it"
    mlp = SwiGLU(config.hidden_size, config.intermediate_size, config.mlp_bias)
    return HQLTBlock(HybridMemory(**config.layer_options(layer)), mlp, **config.block_options(layer))


def refuse_misspelt(kwargs: dict[str, Any], packed: bool) -> None:
    """Arguments that callers of transformers add are left aside, but not one that was meant for us."""
    for name, value in kwargs.items():
        if isinstance(value, Cache):
            raise TypeError(f"forward: expected a cache as past_key_values (or cache), got it as {name!r}")
        near = difflib.get_close_matches(name, ARGUMENTS, n=1, cutoff=0.85)
        if near:
            raise TypeError(f"forward: got an unknown argument {name!r}; did you mean {near[0]!r}?")
        if name in PACKING and not packed:
            raise ValueError(
                f"{name}: expected packed documents to be told apart by `position_ids` (0 where one begins) or "
                f"`resets`, got {name} alone, which this model does not read"
            )


def _as_dict(return_dict: bool | None, config: PreTrainedConfig) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)
