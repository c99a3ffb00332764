"""Models of plain PyTorch, Hugging Face and Megatron-Core, made mixtures by one line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import moefied_on_ranks as on_ranks
import pytest
import torch
from distributed import ranks
from experiments import experiment, layout
from torch import Tensor, nn

import megatron_moe
from megatron_moe.config.errors import InputError
from megatron_moe.model.moe.experts import Experts
from megatron_moe.model.moe.module_experts import ModuleExperts

WIDTH = 16
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
GROUPED = {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
OPT = {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": WIDTH}
HUGGING_FACE: dict[str, tuple[dict[str, Any], type[nn.Module], int]] = {
    "Llama": (SIZES | GROUPED, Experts, 2),
    "Qwen2": (SIZES | GROUPED, Experts, 2),
    "Phi3": (SIZES | GROUPED, Experts, 2),
    "Bert": (SIZES, Experts, 2),
    "OPT": (OPT, Experts, 2),
    "GPT2": (GPT2, ModuleExperts, 2),  # its gelu is approximated
    "Albert": (SIZES | {"embedding_size": 8}, ModuleExperts, 1),  # two layers share one
}


def hugging_face(family: str, settings: dict[str, Any]) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    model: nn.Module = getattr(transformers, f"{family}Model")(config)
    return model


class Block(nn.Module):
    """A residual block whose feed-forward layer has a name of its own."""

    def __init__(self, feed_forward: nn.Module) -> None:
        super().__init__()
        self.before, self.ffn = nn.Linear(WIDTH, WIDTH), feed_forward

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.ffn(torch.tanh(self.before(x)))
        return y


def sequential(activation: nn.Module, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 24), activation, nn.Dropout(dropout), nn.Linear(24, WIDTH))


def same_after(model: nn.Module, run: Callable[[nn.Module], Tensor], **arguments: Any) -> nn.Module:
    """The model, after it was seen to compute what it did, and to train its routers and experts."""
    model.eval()
    with torch.no_grad():
        before = run(model)
        megatron_moe.moefy(model, **({"num_experts": 4} | arguments))
        after = run(model)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=2e-6)
    model.train()
    run(model).square().mean().backward()
    assert megatron_moe.mixtures(model)
    for mixture in megatron_moe.mixtures(model).values():
        assert all(parameter.grad is not None for parameter in mixture.parameters())
        assert mixture.statistics().tokens > 0
    return model


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_hugging_face_models_compute_what_they_did(family: str) -> None:
    settings, kind, layers = HUGGING_FACE[family]
    tokens = torch.arange(14).view(2, 7)
    model = hugging_face(family, settings)
    same_after(model, lambda m: m(tokens).last_hidden_state)
    found = list(megatron_moe.mixtures(model).values())
    assert len(found) == layers and all(type(mixture.experts) is kind for mixture in found)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_pytorchs_transformer_layers_compute_what_they_did(activation: str, batch_first: bool) -> None:
    x = torch.randn(3, 5, WIDTH)
    options: dict[str, Any] = {"activation": activation, "batch_first": batch_first}
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, **options)
    padding = torch.zeros((3, 5) if batch_first else (5, 3), dtype=torch.bool)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
    same_after(stack, lambda m: m(x, src_key_padding_mask=padding))
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 24, **options), 2)
    same_after(decoder, lambda m: m(x, x))
    same_after(layer, lambda m: m(x))
    mixture = stack.layers[0].linear1
    assert mixture.batch_first is batch_first and mixture.moe.moe_expert_dropout == 0.1


@pytest.mark.parametrize(
    ("feed_forward", "kind"),
    [
        (sequential(nn.GELU(), 0.2), Experts),
        (sequential(nn.GELU("tanh")), ModuleExperts),
        (
            nn.Sequential(nn.Linear(WIDTH, 24), nn.SiLU(), nn.Linear(24, WIDTH), nn.LayerNorm(WIDTH)),
            ModuleExperts,
        ),
        (nn.Sequential(nn.Linear(WIDTH, 24, bias=False), nn.ReLU(), nn.Linear(24, WIDTH)), ModuleExperts),
        (nn.Bilinear(WIDTH, WIDTH, WIDTH), None),
    ],
    ids=["known", "other activation", "more layers", "one bias", "no layer"],
)
def test_layers_by_a_pattern_of_names(feed_forward: nn.Module, kind: type[nn.Module] | None) -> None:
    model = nn.Sequential(Block(feed_forward), Block(copy.deepcopy(feed_forward)))
    if kind is None:
        with pytest.raises(InputError, match=r"0\.ffn: Bilinear is no feed-forward layer"):
            megatron_moe.moefy(model, num_experts=4, layers="*.ffn")
        assert megatron_moe.mixtures(model) == {}
        return
    x = torch.randn(3, WIDTH)
    same_after(model, lambda m: m(x), layers="*.ffn")
    assert list(megatron_moe.mixtures(model)) == ["0.ffn", "1.ffn"]
    assert all(type(mixture.experts) is kind for mixture in megatron_moe.mixtures(model).values())


def test_some_layers_by_number_and_the_others_later() -> None:
    model = on_ranks.encoder()
    megatron_moe.moefy(model, num_experts=4, layers=1)
    assert list(megatron_moe.mixtures(model)) == ["layers.1.linear1"]
    megatron_moe.moefy(model, num_experts=2)
    counts = {name: mixture.moe.num_moe_experts for name, mixture in megatron_moe.mixtures(model).items()}
    assert counts == {"layers.0.linear1": 2, "layers.1.linear1": 4}


def test_fresh_experts_and_those_of_a_builder() -> None:
    wide = megatron_moe.moefy(on_ranks.encoder(), num_experts=4, copies=False, ffn_hidden_size=8)
    experts = wide.layers[0].linear1.experts
    assert experts.linear_fc2.shape == (4, WIDTH, 8)
    assert not torch.equal(experts.linear_fc1[0], experts.linear_fc1[1])
    fresh = megatron_moe.moefy(
        Block(sequential(nn.GELU("tanh"))), num_experts=4, copies=False, layers="ffn"
    ).ffn.experts.modules_of_experts
    assert not torch.equal(fresh[0][0].weight, fresh[1][0].weight)
    own = megatron_moe.moefy(on_ranks.encoder(), num_experts=4, expert=lambda: nn.Linear(WIDTH, WIDTH))
    assert type(own.layers[0].linear1.experts.modules_of_experts[3]) is nn.Linear


def test_precision_mode_and_frozen_parameters_are_kept() -> None:
    model = on_ranks.encoder().bfloat16().eval()
    for parameter in model.layers[0].linear1.parameters():
        parameter.requires_grad_(False)
    megatron_moe.moefy(model, num_experts=4)
    for module in model.modules():
        assert not module.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    first, second = (layer.linear1.experts for layer in model.layers)
    frozen = {name for name, parameter in first.named_parameters() if not parameter.requires_grad}
    assert frozen == {"linear_fc1", "bias_fc1.bias"}
    assert all(parameter.requires_grad for parameter in second.parameters())
    assert model.layers[0].linear1.router.weight.requires_grad


def test_layers_that_are_shared_stay_shared() -> None:
    shared = sequential(nn.ReLU())
    model = nn.Sequential(Block(shared), Block(shared))
    x = torch.randn(3, WIDTH)
    same_after(model, lambda m: m(x), layers="*.ffn")
    assert model[0].ffn is model[1].ffn
    twins = nn.Sequential(Block(sequential(nn.ReLU())), Block(sequential(nn.ReLU())))
    for one, other in ((0, 0), (3, 3)):
        twins[1].ffn[other].weight, twins[1].ffn[other].bias = (
            twins[0].ffn[one].weight,
            twins[0].ffn[one].bias,
        )
    same_after(twins, lambda m: m(x), layers="*.ffn")
    assert twins[0].ffn is twins[1].ffn


def test_a_weight_that_is_shared_with_something_else_is_refused() -> None:
    model = nn.Sequential(Block(sequential(nn.ReLU())), Block(sequential(nn.ReLU())))
    model[1].ffn[0].weight = model[0].ffn[0].weight
    before = [id(module) for module in model.modules()]
    with pytest.raises(InputError, match=r"0\.ffn: its parameter 0\.weight is shared with another"):
        megatron_moe.moefy(model, num_experts=4, layers="*.ffn")
    with pytest.raises(InputError, match=r"0\.ffn: its parameter 0\.weight is shared with 1\.ffn\.0"):
        megatron_moe.moefy(model, num_experts=4, layers="0.ffn")
    assert [id(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"topk": 5}, "topk: 5 is more than num_experts (4)"),
        (
            {"layers": [2]},
            "layers: [2] names no feed-forward layer; TransformerEncoder has 2, numbered from 0: ",
        ),
        ({"layers": "*.ffn"}, "no module has a name like *.ffn; TransformerEncoder has layers, layers.0, "),
        ({"ffn_hidden_size": 8}, "ffn_hidden_size: 8 is not the 24 of layers.0"),
        ({"activation": "gelu"}, "activation: gelu is not the relu of layers.0"),
        ({"copies": False, "moe_expert_init_scale": -1.0}, "moe_expert_init_scale: must be"),
        ({"moe_expert_init_scale": 2.0}, "moe_expert_init_scale: has no effect on copies"),
        ({"num_moe_experts": 4}, "num_experts: is the same as num_moe_experts"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_error_names_the_mistake_and_leaves_the_model_as_it_was(
    arguments: dict[str, Any], words: str
) -> None:
    model = on_ranks.encoder()
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(InputError) as error:
        megatron_moe.moefy(model, **({"num_experts": 4} | arguments))
    assert words in str(error.value)
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_an_error_in_a_later_layer_leaves_the_earlier_ones_too() -> None:
    model = nn.Sequential(Block(sequential(nn.ReLU())), Block(nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU())))
    with pytest.raises(InputError, match=r"1\.ffn: Sequential is no feed-forward layer"):
        megatron_moe.moefy(model, num_experts=4, layers="*.ffn")
    assert megatron_moe.mixtures(model) == {}


def test_where_all_are_mixtures_already_it_is_said() -> None:
    model = megatron_moe.moefy(on_ranks.encoder(), num_experts=4)
    with pytest.raises(InputError, match=r"TransformerEncoder has .* mixtures of experts already"):
        megatron_moe.moefy(model, num_experts=4)
    with pytest.raises(InputError, match="Linear is a single layer; give the model that it is part of"):
        megatron_moe.moefy(nn.Linear(3, 3), num_experts=4)


def test_where_nothing_is_found_it_is_said_what_was_looked_at() -> None:
    with pytest.raises(InputError) as error:
        megatron_moe.moefy(Block(sequential(nn.ReLU())), num_experts=4)
    message = str(error.value)
    assert (
        "found no feed-forward layer of known structure in Block; looked at 3 Linear, 1 Sequential" in message
    )
    assert 'layers="ffn"' in message


def test_spread_over_ranks_it_trains_as_in_one_process() -> None:
    alone = megatron_moe.moefy(on_ranks.encoder(), 4, moe_aux_loss_coeff=0.0)
    expected = on_ranks.trained(alone, range(2), average=False)
    for rank, outputs in enumerate(ranks(2).run(on_ranks.expert_parallel)):
        torch.testing.assert_close(outputs, expected[rank::2], rtol=1e-5, atol=1e-6)


@pytest.mark.second_pair
@pytest.mark.parametrize("size", [1, 2])
def test_a_model_of_megatron_core(size: int) -> None:
    dense = experiment(moe=None, parallel=layout(dp=size), model={"num_layers": 2})
    for found in ranks(size).run(on_ranks.of_megatron, dense, size):
        assert found["names"] == ["decoder.layers.0.mlp", "decoder.layers.1.mlp"]
        assert found["difference"] < 1e-5 and found["without_gradient"] == []
        assert set(found["held"]) <= set(found["saved"])


def test_a_model_that_is_split_over_tensor_ranks_is_refused() -> None:
    dense = experiment(moe=None, parallel=layout(tp=2), model={"num_layers": 2})
    for message in ranks(2).run(on_ranks.split_over_tensor_ranks, dense):
        assert message.startswith("decoder.layers.0.mlp: is split over 2 tensor-parallel ranks")
