"""Tutel's MoE layer with its Llama experts, dropless (capacity as large as the fullest expert needs)."""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Any

from moe_peers.contender import Contender, Missing, Problem, of_module


def layer(problem: Problem) -> Contender:
    """Over all ranks as expert-parallel ones."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            tutel: Any = importlib.import_module("tutel.moe")
    except ImportError as error:
        raise Missing(f"Tutel is not installed ({error})") from error
    shape, local = problem.shape, problem.shape.experts // problem.ranks
    with contextlib.redirect_stdout(io.StringIO()):
        module = tutel.moe_layer(
            gate_type={"type": "top", "k": shape.topk, "capacity_factor": 0, "fp32_gate": True},
            experts={
                "type": "llama_ffn",
                "num_experts_per_device": local,
                "hidden_size_per_expert": shape.width,
            },
            model_dim=shape.hidden,
        )
    module = module.to(problem.fc1)
    module.gates[0].wg.weight.data = problem.router.float()
    mine = slice(local * problem.rank, local * (problem.rank + 1))
    gate, up = problem.fc1[mine].transpose(1, 2).chunk(2, dim=2)
    for parameter, value in (
        (module.experts.W_fc1, gate),
        (module.experts.W_fc2, up),
        (module.experts.W_fc3, problem.fc2[mine].transpose(1, 2)),
    ):
        parameter.data = value.contiguous().view_as(parameter)
    return of_module("Tutel, dropless", module, module)
