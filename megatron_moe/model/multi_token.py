"""Multi-token prediction (DeepSeek-V3, section 2.2): layers behind the model, each predicting a further
token.

Weights and their names are those of Megatron-Core's MultiTokenPredictionBlock, which builds the layers. Its
own forward pass rolls tokens between context-parallel ranks, hides padding from routers (0.16.1), takes for
each context-parallel rank a mean of its own, and knows nothing of documents: here everything that a layer
predicts from and towards is in the batch (`data.further_tokens`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_moe.engine.versions import build


class Further(NamedTuple):
    """What one layer predicts from and towards, [b, s] each."""

    tokens: Tensor
    labels: Tensor
    marks: Tensor
    """For routers, see `model.moe.marks`."""


class Parts(NamedTuple):
    """What a layer is built from."""

    norm: Any
    linear: Any
    """Cut over the tensor-parallel ranks by columns."""
    layer: Any
    """A transformer layer."""


class PredictionLayer(MegatronModule):
    """From hidden states h and the embeddings e of further tokens: layer(W [norm(e); norm(h)]), and a norm.

    Args: as Megatron-Core's block gives them; `submodules` are `Parts`.
    """

    def __init__(
        self,
        config: Any,
        submodules: Parts,
        layer_number: int = 1,
        vp_stage: int | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        width = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.enorm = build(submodules.norm, **width)
        self.hnorm = build(submodules.norm, **width)
        self.eh_proj = build(
            submodules.linear,
            2 * config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
        )
        # It is numbered behind the model's layers; to what it is told it adds the layers before its stage.
        number = config.num_layers + layer_number - get_transformer_layer_offset(config, vp_stage)
        self.transformer_layer = build(
            submodules.layer, config=config, layer_number=number, vp_stage=vp_stage
        )
        self.final_layernorm = build(submodules.norm, **width)

    @property
    def mtp_model_layer(self) -> torch.nn.Module:
        """What the schedules of 0.19 call the transformer layer."""
        layer: torch.nn.Module = self.transformer_layer
        return layer

    def forward(
        self, hidden_states: Tensor, embeddings: Tensor, marks: Tensor, **of_attention: Any
    ) -> Tensor:
        """[s, b, h] twice, and [b, s] -> [s, b, h]; under sequence parallelism s is this rank's part.

        Args:
            of_attention: what every layer gets beside its input.
        """
        parallel = self.config.sequence_parallel
        # As Megatron-Core's transformer block: other dropout on other tokens.
        state = tensor_parallel.get_cuda_rng_tracker().fork() if parallel else contextlib.nullcontext()
        with state:
            both = torch.cat((self.enorm(embeddings), self.hnorm(hidden_states)), -1)
            joined = gather_from_tensor_model_parallel_region(self.eh_proj(both)[0])
            if parallel:
                joined = scatter_to_sequence_parallel_region(joined)
            output, _ = self.transformer_layer(joined, padding_mask=marks, **of_attention)
        normed: Tensor = self.final_layernorm(output)
        return normed


def block_spec(parts: Parts, count: int) -> MultiTokenPredictionBlockSubmodules:
    """Of so many layers, as GPTModel takes it."""
    layer = ModuleSpec(module=PredictionLayer, submodules=parts)
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * count)


class FurtherPredictingModel(GPTModel):
    """A GPTModel whose last stage returns the losses of all predictions in training: [1 + D, b, s], the next
    token's first. Without `further`, as in evaluation, it is the model without its D further layers; without
    labels it returns logits [b, s, padded v]."""

    _further: Sequence[Further] | None = None

    def forward(self, *args: Any, further: Sequence[Further] | None = None, **kwargs: Any) -> Tensor:
        """Args: as GPTModel, and:
        further: for each further layer; on every stage the same, or None.
        """
        self._further = further
        try:
            output: Tensor = super().forward(*args, **kwargs)
        finally:
            self._further = None
        return output

    def _postprocess(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor,
        labels: Tensor | None,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        further = self._further or ()
        depths = [hidden_states]
        if self.mtp_process:
            for layer, next_ones in zip(self.mtp.layers, further, strict=bool(further)):
                embeddings = self.embedding(input_ids=next_ones.tokens, position_ids=position_ids)
                depths.append(
                    layer(
                        depths[-1],
                        embeddings,
                        next_ones.marks,
                        attention_mask=attention_mask,
                        rotary_pos_emb=rotary_pos_emb,
                    )
                )
        elif self.post_process:
            depths = list(hidden_states.chunk(1 + len(further)))
        if not self.post_process:
            return torch.cat(depths) if len(depths) > 1 else hidden_states
        weight = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        if labels is None:
            logits: Tensor = self.output_layer(hidden_states, weight=weight)[0]
            return logits.transpose(0, 1).contiguous()
        losses = [
            self.compute_language_model_loss(targets, self.output_layer(hidden, weight=weight)[0])
            for hidden, targets in zip(depths, [labels, *(it.labels for it in further)], strict=True)
        ]
        return torch.stack(losses) if further else losses[0]
