"""A model in inference: the stages of a pipeline one behind the other, no gradients, no padding.

It walks the layers that training builds itself, instead of calling Megatron-Core's blocks: what these do
around them (recomputation, overlap, dropout, marks for profilers) takes longer than a layer does with the one
token of a step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.rule import set_value
from megatron_moe.config.schema import Experiment
from megatron_moe.inference.attention import CachedAttention
from megatron_moe.inference.cache import Cache
from megatron_moe.inference.linear import lighten
from megatron_moe.inference.rotary import Rotary
from megatron_moe.inference.step import Step
from megatron_moe.model.moe.gates import needs_marks
from megatron_moe.model.moe.marks import mark


class Network:
    """This rank's part of the model.

    Args:
        chunk: the GPTModel of this rank's stage, with its weights.
        experiment: that it was built from.
        dtype: of the weights.

    Megatron-Core's parallel state must be initialised.
    """

    def __init__(self, chunk: Any, experiment: Experiment, dtype: torch.dtype) -> None:
        from megatron.core import parallel_state

        from megatron_moe.inference.latent_attention import CachedLatentAttention

        self.model = getattr(chunk, "module", chunk).eval().requires_grad_(False)
        lighten(self.model)
        self.dtype, self.config = dtype, self.model.config
        self.vocab_size = set_value(experiment.model.vocab_size)
        self.positions = set_value(experiment.model.max_position_embeddings)
        self.device = torch.device(torch.cuda.current_device())
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        self.is_first, self.is_last = self.model.pre_process, self.model.post_process
        self.marked = experiment.moe is not None and needs_marks(experiment.moe)
        self.layers = list(self.model.decoder.layers)
        latent = experiment.model.multi_latent_attention is not None
        kind = CachedLatentAttention if latent else CachedAttention
        self.rotary = self._rotary(latent)
        self.attentions = [
            kind(layer.self_attention, number, None if self._has_no_rope(layer) else self.rotary)
            for number, layer in enumerate(self.layers)
        ]

    def _rotary(self, latent: bool) -> Rotary | None:
        """The same for all layers of the stage; None without them, and where positions are embedded."""
        if not self.layers:
            return None
        if latent:
            module = self.layers[0].self_attention.rotary_pos_emb
            return Rotary(module, self.positions, self.dtype, self.config.rotary_interleaved, gathers=True)
        if self.model.position_embedding_type in ("learned_absolute", "none"):
            return None
        return Rotary(self.model.rotary_pos_emb, self.positions, self.dtype, self.config.rotary_interleaved)

    def _has_no_rope(self, layer: Any) -> bool:
        every = self.config.no_rope_freq
        return bool(every and every[layer.layer_number - 1])

    @torch.inference_mode()
    def hidden(self, step: Step, cache: Cache | None) -> Tensor | None:
        """The hidden states [t, h] of a step behind the last norm on the last stage; None on others.

        A collective over the ranks of a replica, and where experts are spread over replicas over these.
        """
        if self.is_first:
            hidden = self.model.embedding(step.tokens[None], step.positions[None])
        else:
            hidden = self._from_previous(step.count)
        angles = None if self.rotary is None else self.rotary.at(step.positions)
        marks = mark(None, step.tokens, step.positions)[None] if self.marked else None
        for layer, attention in zip(self.layers, self.attentions, strict=True):
            normed = layer.input_layernorm(hidden)
            hidden = _added(hidden, *attention(normed, step, cache, angles))
            normed = layer.pre_mlp_layernorm(hidden)
            output = layer.mlp(normed) if marks is None else layer.mlp(normed, padding_mask=marks)
            hidden = _added(hidden, *output)
        if not self.is_last:
            self._to_next(hidden)
            return None
        return self.model.decoder.final_layernorm(hidden).squeeze(1)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[t, h] -> [t, v] float32, of the vocabulary without its padding; on the last stage."""
        tied = self.model.share_embeddings_and_output_weights
        weight = self.model.shared_embedding_or_output_weight() if tied else self.model.output_layer.weight
        bias = self.model.output_layer.bias
        logits = torch.nn.functional.linear(hidden, weight, bias).float()
        if self.tensor_group.size() > 1:
            parts = [torch.empty_like(logits) for _ in range(self.tensor_group.size())]
            dist.all_gather(parts, logits, group=self.tensor_group)
            logits = torch.cat(parts, dim=-1)
        return logits[:, : self.vocab_size]

    def from_last(self, values: Tensor) -> Tensor:
        """What the last stage has in a tensor, on all stages."""
        if self.pipeline_group.size() > 1:
            dist.broadcast(values, dist.get_process_group_ranks(self.pipeline_group)[-1], self.pipeline_group)
        return values

    def _from_previous(self, count: int) -> Tensor:
        dtype = torch.float32 if self.config.fp32_residual_connection else self.dtype
        hidden = torch.empty(count, 1, self.config.hidden_size, dtype=dtype, device=self.device)
        dist.recv(hidden, self._neighbour(-1), group=self.pipeline_group)
        return hidden

    def _to_next(self, hidden: Tensor) -> None:
        dist.send(hidden.contiguous(), self._neighbour(1), group=self.pipeline_group)

    def _neighbour(self, distance: int) -> int:
        ranks = dist.get_process_group_ranks(self.pipeline_group)
        return int(ranks[self.pipeline_group.rank() + distance])


def _added(residual: Tensor, output: Tensor, bias: Tensor | None) -> Tensor:
    return residual + (output if bias is None else output + bias)
