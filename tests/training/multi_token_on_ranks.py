"""Run on ranks: multi-token prediction of a tiny model, and the same written out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.data.further_tokens import with_further_tokens
from megatron_moe.engine import groups, schedule
from megatron_moe.model.gpt import build_chunks
from megatron_moe.plan import plan
from megatron_moe.training.forward import forward_step

Found = tuple[float, Tensor, dict[str, Tensor]]
"""The loss, the report, and gradients by parameter."""


def _model(experiment: Experiment) -> Any:
    its_plan = plan.make(experiment)
    groups.initialize_model_parallel(its_plan.layout, experiment.training.seed, 60)
    (model,) = build_chunks(experiment, its_plan, torch.float32)
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:  # norms, which begin at 1
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
        assert weight.requires_grad, name
    return model


def _gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def _through(model: Any, batch: dict[str, Tensor], depths: int) -> tuple[Tensor, Tensor]:
    mine = schedule.share_of_context(with_further_tokens(batch, depths), torch.device("cpu"))
    output, loss_of = forward_step(iter([mine]), model)
    found: Any = loss_of(output)
    return found[0], found[2]


def trained_and_written_out(experiment: Experiment, batch: dict[str, Tensor]) -> list[Found]:
    """What the trainer computes, and what it should."""
    model = _model(experiment)
    scale, depths = experiment.model.mtp_loss_scaling_factor, experiment.model.mtp_num_layers
    results: list[Found] = []
    for loss, report in (
        _through(model, batch, depths),
        _written_out(model, batch, depths, scale, experiment.model.layernorm_epsilon),
    ):
        results.append((float(loss), report.double(), _gradients(model, loss)))
    return results


def _written_out(
    model: Any, batch: dict[str, Tensor], depths: int, scale: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3, equations 21 to 25, token by token; only the transformer layers are the model's own."""
    tokens, labels, mask = (batch[name] for name in ("tokens", "labels", "loss_mask"))
    length, table = tokens.size(1), model.embedding.word_embeddings.weight
    rotary = model.rotary_pos_emb(length)

    def norm(x: Tensor, module: Any) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * module.weight

    hidden = model.decoder(
        hidden_states=table[tokens].transpose(0, 1), attention_mask=None, rotary_pos_emb=rotary
    )
    total, report = torch.zeros(()), []
    for depth in range(depths + 1):
        if depth:
            layer = model.mtp.layers[depth - 1]
            # Token i + depth beside the hidden state of token i; at the end there is none.
            further = torch.cat([tokens[:, depth:], torch.zeros_like(tokens[:, :depth])], 1)
            both = torch.cat(
                [norm(table[further].transpose(0, 1), layer.enorm), norm(hidden, layer.hnorm)], -1
            )
            hidden, _ = layer.transformer_layer(
                both @ layer.eh_proj.weight.T, attention_mask=None, rotary_pos_emb=rotary
            )
            hidden = norm(hidden, layer.final_layernorm)
        sums, targets = torch.zeros(()), 0
        for row in range(len(tokens)):
            for place in range(length - depth):
                if mask[row, place + depth]:
                    logits = model.output_layer.weight @ hidden[place, row]
                    sums = sums + F.cross_entropy(logits[None], labels[row, place + depth][None])
                    targets += 1
        total = total + sums / targets * (scale / depths if depth else 1)
        report += [float(sums), float(targets)]
    return total, torch.tensor(report)


def packed_and_alone(experiment: Experiment, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The reports of documents in one sample, kept apart, and the sum of those of each alone."""
    model, depths = _model(experiment), experiment.model.mtp_num_layers
    generator = torch.Generator().manual_seed(5)
    names = ("tokens", "labels", "position_ids")
    whole = {name: torch.randint(0, 250, (1, sum(lengths)), generator=generator) for name in names}
    whole["loss_mask"] = (torch.rand(1, sum(lengths), generator=generator) > 0.2).float()
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts[0, [sum(lengths[:number]) for number in range(len(lengths))]] = True
    _, packed = _through(model, {**whole, "document_starts": starts}, depths)
    parts = zip(*(whole[name].split(lengths, 1) for name in whole), strict=True)
    alone = [_through(model, dict(zip(whole, part, strict=True)), depths)[1] for part in parts]
    return packed, torch.stack(alone).sum(0)


def built_and_planned(experiment: Experiment) -> list[tuple[int, int]]:
    """Parameters of each of this rank's model chunks: what is built, and what the plan says."""
    its_plan = plan.make(experiment)
    copy = its_plan.rank_of_embedding_copy
    groups.initialize_model_parallel(its_plan.layout, experiment.training.seed, 60, copy)
    chunks = build_chunks(experiment, its_plan, torch.float32)
    costs = [its_plan.stage_costs[stage.index] for stage in its_plan.stages_on(torch.distributed.get_rank())]
    return [
        (sum(weight.numel() for weight in chunk.parameters()), cost.parameters_per_rank)
        for chunk, cost in zip(chunks, costs, strict=True)
    ]
