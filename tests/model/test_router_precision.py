"""A router computes in float32, or float64, whatever the model does; what travels stays bf16."""

from __future__ import annotations

from pathlib import Path

import precision_on_ranks as on_ranks
import pytest
import torch
from distributed import ranks
from experiments import MOE, experiment, layout
from torch import Tensor

from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.router import Router

T, E, H = 512, 16, 64


def router(dtype: str) -> tuple[Router, Tensor]:
    """A router and hidden states [t, 1, h] in bf16."""
    made = Router(MoE(num_moe_experts=E, moe_router_dtype=dtype), H, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    made.weight.data = torch.randn(E, H, generator=generator).bfloat16()
    return made, torch.randn(T, 1, H, generator=generator).bfloat16()


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("fp64", torch.float64)])
def test_choices_are_those_of_the_routers_precision(name: str, dtype: torch.dtype) -> None:
    """The product of the same bf16 numbers in bf16 would send some tokens elsewhere."""
    made, hidden = router(name)
    routing = made(hidden)
    flat = hidden.flatten(0, 1)
    exact = flat.double() @ made.weight.detach().double().T
    rounded = (flat @ made.weight.detach().T).float()
    assert torch.equal(routing.experts, exact.topk(2).indices)
    assert not torch.equal(routing.experts, rounded.topk(2).indices)
    assert routing.weights.dtype == dtype
    expected = exact.topk(2).values.softmax(-1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(routing.weights.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients_are_those_of_the_model() -> None:
    made, hidden = router("fp32")
    hidden.requires_grad_()
    made(hidden).weights.square().sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert made.weight.grad is not None and made.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dispatcher", ["alltoall", "deduplicated", "allgather"])
def test_hidden_states_travel_in_bf16(dispatcher: str) -> None:
    """Forward and backward, of all that is as wide as a hidden state."""
    moe = MOE | {"moe_token_dispatcher_type": dispatcher}
    setup = experiment(
        moe, parallel=layout(dp=2, expert_model_parallel_size=2), training={"precision": "bf16"}
    )
    for sent, output in ranks(2).run(on_ranks.what_travels, setup, Path()):
        assert sent and set(sent) == {"torch.bfloat16"}
        assert output == "torch.bfloat16"
