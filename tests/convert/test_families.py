"""Every family's config.json and names of weights, both ways, against what transformers writes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import CASES, LENGTH, LINEAR, LLAMA3, OF_DEEPSEEK, YARN, experiment_of, tiny

from megatron_moe.convert.agreement import disagreements
from megatron_moe.convert.families import FAMILIES
from megatron_moe.convert.family import NotOfFamily


@pytest.mark.parametrize("name", CASES)
def test_every_weight_has_a_place_and_comes_back_with_the_same_bytes(name: str) -> None:
    model = tiny(name)
    left = dict(model.weights)
    ours: set[str] = set()
    for group in model.family.groups(model.experiment()):
        theirs = [left.pop(it) for it in group.theirs]
        mine = group.to_ours(theirs)
        assert len(mine) == len(group.ours) and ours.isdisjoint(group.ours)
        ours |= set(group.ours)
        for before, after in zip(theirs, group.to_theirs(mine), strict=True):
            assert after.dtype == before.dtype and after.is_contiguous()
            assert torch.equal(before, after)
    assert not left


@pytest.mark.parametrize("name", CASES)
def test_config_comes_back_as_a_model_of_the_same_numbers(name: str) -> None:
    """Transformers builds from what we write a model that computes the same from the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tiny(name)
    experiment = model.experiment()
    written = model.family.config(experiment)
    assert not list(disagreements(experiment, model.family.sections(written)))
    assert experiment_of(model.family.sections(written)) == experiment
    if model.family.name == "skywork_moe":
        return
    config = AutoConfig.for_model(**copy.deepcopy(written), attn_implementation="eager")
    again = AutoModelForCausalLM.from_config(config).float()
    again.load_state_dict(model.model.state_dict())
    tokens = torch.arange(2 * LENGTH).reshape(2, LENGTH)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model.model(tokens).logits)


@pytest.mark.parametrize("name", CASES)
def test_spelling_of_transformers_4_means_the_same(name: str) -> None:
    model = tiny(name)
    older = dict(model.config)
    rotary = dict(older.pop("rope_parameters"))
    older["torch_dtype"] = older.pop("dtype")
    older["rope_theta"] = rotary.pop("rope_theta")
    kind = rotary.pop("rope_type")
    older["rope_scaling"] = None if kind == "default" else {"type": kind, **rotary}
    assert model.family.sections(older) == model.family.sections(model.config)


UNKNOWN: dict[str, tuple[str, dict[str, Any], str]] = {
    "a key that nobody knows": ("llama", {"logit_softcap": 30.0}, "logit_softcap"),
    "frequencies that follow the length": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope_parameters",
    ),
    "another activation": ("mistral", {"hidden_act": "relu"}, "hidden_act"),
    "a number that is none": ("qwen2", {"num_attention_heads": "six"}, "num_attention_heads"),
    "a missing size": ("qwen3", {"hidden_size": None}, "hidden_size"),
    "layers of another kind": (
        "qwen3",
        {"layer_types": ["linear_attention"] * 2},
        "layer_types",
    ),
    "jitter": ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    "biases of latent attention": ("deepseek_v2", {"attention_bias": True}, "attention_bias"),
    "the narrow norms' epsilon": ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    "neighbours that don't turn together": ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
    "a router of V3 in V2": ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
    "four bits": ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
    "another clamp": ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit"),
    "a router of two layers": ("skywork_moe", {"moe_2layer_gate": True}, "moe_2layer_gate"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_computed_is_refused_by_its_key(name: str) -> None:
    family, keys, named = UNKNOWN[name]
    with pytest.raises(NotOfFamily, match=named):
        FAMILIES[family].sections({**tiny(family).config, **keys})


def test_all_mistakes_of_a_config_are_told_at_once() -> None:
    wrong = {"hidden_act": "relu", "logit_softcap": 30.0}
    with pytest.raises(NotOfFamily) as found:
        FAMILIES["llama"].sections({**tiny("llama").config, **wrong})
    assert [line.partition(":")[0] for line in str(found.value).splitlines()] == list(wrong)


FOREIGN: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "experts": ("llama", {}, {"num_moe_experts": 4}, "moe"),
    "norms of heads": ("qwen2", {"qk_norm": "head"}, {}, "model.qk_norm"),
    "no biases": ("qwen2", {"qkv_bias": False}, {}, "model.qkv_bias"),
    "one bias of two": ("llama", {"qkv_bias": True}, {}, "model.attention_output_bias"),
    "another activation": ("mistral", {"activation": "relu"}, {}, "model.activation"),
    "a field of Megatron-Core": ("llama", {"megatron_core": {"qk_l2_norm": True}}, {}, "model.megatron_core"),
    "a dense layer": ("mixtral", {}, {"moe_layer_freq": [0, 1]}, "moe.moe_layer_freq"),
    "a gate": ("mixtral", {}, {"moe_router_gate": "noisy_topk"}, "moe.moe_router_gate"),
    "shares of all experts": ("mixtral", {}, {"moe_router_pre_softmax": True}, "moe.moe_router_pre_softmax"),
    "a shared expert of its own width": (
        "deepseek_v3",
        {},
        {"moe_shared_expert_intermediate_size": 13},
        "moe.moe_shared_expert_intermediate_size",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_an_experiment_without_words_is_refused(name: str) -> None:
    family, model, moe, named = FOREIGN[name]
    sections = tiny(family).family.sections(tiny(family).config)
    sections["model"] |= model
    if moe:
        sections["moe"] = {**sections.get("moe", {}), **moe}
    with pytest.raises(NotOfFamily, match=rf"(?m)^{named}: "):
        FAMILIES[family].config(experiment_of(sections))


def test_keys_of_training_do_not_matter() -> None:
    sections = tiny("mixtral").family.sections(tiny("mixtral").config)
    sections["moe"] |= {
        "moe_expert_capacity_factor": 1.25,
        "moe_z_loss_coeff": 0.001,
        "moe_aux_loss_coeff": 0.01,
        "moe_router_load_balancing_type": "skywork_aux_loss",
    }
    written = FAMILIES["mixtral"].config(experiment_of(sections))
    assert written["router_aux_loss_coef"] == 0.0 and written["num_local_experts"] == 5


def test_copies_that_differ_are_told() -> None:
    from megatron_moe.config.errors import InputError

    model = tiny("deepseek_v3")
    group = next(it for it in model.family.groups(model.experiment()) if "lm_head.weight" in it.theirs)
    with pytest.raises(InputError, match=r"layers.3.shared_head.head.weight is no copy of lm_head.weight"):
        group.to_ours([model.weights[group.theirs[0]], model.weights[group.theirs[0]] + 1])


def test_rows_of_padding_are_zero_and_do_not_come_back() -> None:
    model = tiny("llama")
    sections = model.family.sections(model.config)
    sections["model"]["make_vocab_size_divisible_by"] = 128
    groups = model.family.groups(experiment_of(sections))
    group = next(it for it in groups if it.theirs == ("lm_head.weight",))
    (padded,) = group.to_ours([model.weights["lm_head.weight"]])
    assert padded.shape == (256, 24) and not padded[200:].any()
    (back,) = group.to_theirs([padded])
    assert torch.equal(back, model.weights["lm_head.weight"])


OF_FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "model.layernorm_epsilon": ("deepseek_v3", {"layernorm_epsilon": 1e-5}),
    "model.kv_channels": ("olmoe", {"kv_channels": 6}),
}


@pytest.mark.parametrize("key", OF_FAMILY)
def test_values_that_a_family_does_not_have_are_refused(key: str) -> None:
    family, model = OF_FAMILY[key]
    sections = tiny(family).family.sections(tiny(family).config)
    sections["model"] |= model
    theirs = {"model.layernorm_epsilon": "rms_norm_eps", "model.kv_channels": "head_dim"}[key]
    with pytest.raises(NotOfFamily, match=f"^in config.json: {theirs}"):
        FAMILIES[family].config(experiment_of(sections))


def _sizes(family: str) -> st.SearchStrategy[dict[str, Any]]:
    """Keys of a config.json, in any mixture."""
    number, flag = st.integers(1, 9), st.booleans()
    keys: dict[str, st.SearchStrategy[Any]] = {
        "vocab_size": st.integers(8, 600),
        "tie_word_embeddings": flag,
        "rms_norm_eps": st.sampled_from([1e-5, 1e-6]),
        "rope_parameters": st.sampled_from([None, LLAMA3, YARN, LINEAR, {"rope_theta": 7e5}]),
        "initializer_range": st.floats(0.01, 1.0),
    }
    if family.startswith("deepseek"):
        keys |= {"rms_norm_eps": st.just(1e-6), "rope_parameters": st.sampled_from([None, OF_DEEPSEEK])}
        keys |= {"first_k_dense_replace": st.integers(0, 2), "n_shared_experts": st.integers(0, 3)}
        keys |= {"q_lora_rank": st.none() | number, "routed_scaling_factor": st.floats(0.5, 20.0)}
        keys |= {"aux_loss_alpha": st.floats(0.0, 1.0), "n_group": st.sampled_from([2, 4, 8])}
    else:
        keys |= {"num_key_value_heads": st.sampled_from([1, 2, 3, 6])}
    if family not in ("deepseek_v2", "deepseek_v3", "olmoe"):
        keys["head_dim"] = st.sampled_from([4, 8, 10])
    if family in ("llama", "qwen3", "qwen3_moe", "olmoe", "gpt_oss"):
        keys["attention_bias"] = flag
    if family in ("qwen2", "qwen3", "qwen2_moe"):
        keys |= {"use_sliding_window": flag, "sliding_window": number, "max_window_layers": st.integers(0, 3)}
    if family in ("mistral", "mixtral", "gpt_oss"):
        keys["sliding_window"] = st.none() | number
    if "qwen" in family and "moe" in family:
        keys |= {
            "norm_topk_prob": flag,
            "decoder_sparse_step": st.integers(1, 2),
            "mlp_only_layers": st.just([1]),
        }
    return st.fixed_dictionaries({}, optional=keys)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_config_comes_back(family: str, data: st.DataObject) -> None:
    model = tiny(family)
    keys = data.draw(_sizes(family))
    if family == "gpt_oss":
        # Without a window there are no layers that have one.
        keys |= {} if keys.get("sliding_window", 1) else {"layer_types": ["full_attention"] * 3}
    config = {**model.config, **keys}
    if "use_sliding_window" in keys:
        del config["layer_types"]
    experiment = experiment_of(model.family.sections(config))
    assert experiment_of(model.family.sections(model.family.config(experiment))) == experiment
