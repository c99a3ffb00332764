"""Parameters and FLOPs against published figures. (What a rank holds: test_built_by_megatron.py.)"""

from __future__ import annotations

import pytest
from plan_experiments import filled

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.plan.costs import count_parameters, flops_per_token, padded_vocab_size


def model(
    layers: int,
    hidden: int,
    heads: tuple[int, int, int],
    vocabulary: int,
    experts: tuple[int, int, int] | None,
    seq_length: int = 4096,
    **keys: object,
) -> Experiment:
    """`heads`: query heads, key heads, width of one; `experts`: number, top-k, inner width."""
    return filled(
        model={
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads[0],
            "num_query_groups": heads[1],
            "kv_channels": heads[2],
            "vocab_size": vocabulary,
            "ffn_hidden_size": 12288,
            "megatron_core": keys,
        },
        moe=None
        if experts is None
        else {
            "num_moe_experts": experts[0],
            "moe_router_topk": experts[1],
            "moe_ffn_hidden_size": experts[2],
        },
        training={"seq_length": seq_length},
    )


SKYWORK = model(52, 4608, (36, 36, 128), 65536, (16, 2, 12288), seq_length=8192)
SKYWORK_PARENT = model(52, 4608, (36, 36, 128), 65536, None)

PUBLISHED = {
    "Mixtral 8x7B": (model(32, 4096, (32, 8, 128), 32000, (8, 2, 14336)), 46.7e9, 12.9e9),
    "Mixtral 8x22B": (model(56, 6144, (48, 8, 128), 32768, (8, 2, 16384)), 141e9, 39e9),
    "Skywork-MoE": (SKYWORK, 146.36e9, 22.69e9),
    "Skywork-MoE's dense parent": (SKYWORK_PARENT, 13.85e9, 13.85e9),
    "Qwen3-30B-A3B": (
        model(48, 2048, (32, 4, 128), 151936, (128, 8, 768), qk_layernorm=True),
        30.5e9,
        # Published as 3.3, cut from 3.353: two digits cannot be met within 1 %.
        3.35e9,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    experiment, total, active = PUBLISHED[name]
    parameters = count_parameters(experiment)
    assert parameters.total == pytest.approx(total, rel=0.01)
    assert parameters.active == pytest.approx(active, rel=0.01)


def test_flops_are_those_behind_skyworks_published_utilisation() -> None:
    """6N + 12 L h s gives 157.9 GFLOP a token at 8192 tokens, N without the looked-up embedding."""
    assert flops_per_token(SKYWORK) == pytest.approx(157.9e9, rel=0.001)


@pytest.mark.parametrize(
    ("tokens_per_second", "utilisation"), [(1873, 0.565), (1417, 0.431), (1828, 0.551), (1775, 0.535)]
)
def test_the_dense_parents_published_speeds_give_its_published_utilisations(
    tokens_per_second: int, utilisation: float
) -> None:
    """Each on A800s of 312 TFLOP/s; agreement to one percentage point."""
    ours = tokens_per_second * flops_per_token(SKYWORK_PARENT) / 312e12
    assert ours == pytest.approx(utilisation, abs=0.01)


def test_tying_the_embeddings_saves_parameters_and_no_flops() -> None:
    untied = filled()
    tied = filled(model={"untie_embeddings_and_output_weights": False})
    saved = count_parameters(untied).total - count_parameters(tied).total
    assert saved == untied.model.vocab_size * untied.model.hidden_size
    assert flops_per_token(tied) == flops_per_token(untied)


@pytest.mark.parametrize(("vocabulary", "padded"), [(250, 256), (256, 256), (257, 384)])
def test_only_ranks_hold_the_padded_vocabulary(vocabulary: int, padded: int) -> None:
    experiment = filled(model={"vocab_size": vocabulary})
    assert padded_vocab_size(experiment) == padded
    grown = count_parameters(filled(model={"vocab_size": vocabulary + 1})).total
    assert grown - count_parameters(experiment).total == 2 * experiment.model.hidden_size


def test_a_model_with_weights_that_are_not_counted_is_refused_by_its_keys() -> None:
    experiment = filled(model={"megatron_core": {"moe_latent_size": 16, "attention_output_gate": True}})
    with pytest.raises(InputError) as refused:
        count_parameters(experiment)
    assert [problem.split(" = ")[0] for problem in refused.value.problems] == [
        "model.megatron_core.attention_output_gate",
        "model.megatron_core.moe_latent_size",
    ]


@pytest.mark.parametrize("gate", ["hash", "noisy_topk", "switch", "swipe"])
@pytest.mark.parametrize("biases", [False, True])
def test_the_gate_decides_what_a_router_holds(gate: str, biases: bool) -> None:
    from megatron_moe.model.moe.router import Router

    def of(gate: str) -> tuple[int, int]:
        experiment = filled(
            model={"megatron_core": {"add_bias_linear": biases}}, moe={"moe_router_gate": gate}
        )
        assert experiment.moe is not None
        router = Router(experiment.moe, experiment.model.hidden_size, has_bias=biases)
        held = sum(parameter.numel() for parameter in router.parameters())
        return count_parameters(experiment).total, held * experiment.model.num_layers

    (plain, held_plain), (other, held) = of("topk"), of(gate)
    assert other - plain == held - held_plain
