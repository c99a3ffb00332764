"""Tiny random models of every family, as transformers writes them to disk, with odd sizes."""

from __future__ import annotations

import functools
import json
import logging
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.defaults import fill
from megatron_moe.config.schema import Experiment
from megatron_moe.convert.families import FAMILIES
from megatron_moe.convert.family import Family

LENGTH = 24
SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
UNBALANCED = {"router_aux_loss_coef": 0.0}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, **UNBALANCED}
LATENT = {
    **SIZES,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "aux_loss_alpha": 0.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 37.6,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
OF_DEEPSEEK = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.9, "beta_fast": 2.0, "beta_slow": 0.7}


@dataclass(frozen=True)
class Case:
    """A family, and keys of its config.json over SIZES or LATENT."""

    family: str
    keys: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "llama": Case("llama", {"rope_parameters": LLAMA3}),
    "llama, tied, biases, wide heads": Case(
        "llama",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 10,
            "vocab_size": 201,
        },
    ),
    "llama, one key head, linear": Case("llama", {"num_key_value_heads": 1, "rope_parameters": LINEAR}),
    "mistral": Case("mistral", {"sliding_window": 7, "head_dim": 8}),
    "mistral, no window": Case("mistral", {"sliding_window": None}),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2, window in the last layer": Case(
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen3": Case("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3, biases, window": Case(
        "qwen3",
        {
            "head_dim": 6,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": Case("mixtral", {"num_local_experts": 5, "router_aux_loss_coef": 0.0, "sliding_window": 9}),
    "qwen2_moe": Case(
        "qwen2_moe",
        {**EXPERTS, "shared_expert_intermediate_size": 20, "num_hidden_layers": 3, "decoder_sparse_step": 2},
    ),
    "qwen2_moe, normalized, window": Case(
        "qwen2_moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 20,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "qwen3_moe": Case(
        "qwen3_moe",
        {**EXPERTS, "head_dim": 8, "norm_topk_prob": True, "mlp_only_layers": [0], "num_hidden_layers": 3},
    ),
    "qwen3_moe, shares of all": Case("qwen3_moe", {**EXPERTS, "head_dim": 4, "attention_bias": True}),
    "olmoe": Case(
        "olmoe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "clip_qkv": 0.8,
            "router_aux_loss_coef": 0.0,
            "pad_token_id": 1,
        },
    ),
    "deepseek_v2": Case(
        "deepseek_v2",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "n_shared_experts": 2,
            "rope_parameters": OF_DEEPSEEK,
        },
    ),
    "deepseek_v2, queries at once": Case("deepseek_v2", {"q_lora_rank": None, "first_k_dense_replace": 2}),
    "deepseek_v3": Case(
        "deepseek_v3",
        {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1, "rope_parameters": OF_DEEPSEEK},
    ),
    "deepseek_v3, one group": Case(
        "deepseek_v3",
        {
            "n_group": 1,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
        },
    ),
    "gpt_oss": Case(
        "gpt_oss",
        {
            "head_dim": 16,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.0,
            "sliding_window": 6,
            "num_hidden_layers": 3,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "skywork_moe": Case("skywork_moe", {"num_local_experts": 5, "router_aux_loss_coef": 0.0}),
}


@dataclass(frozen=True)
class Tiny:
    """A model of transformers, and what it writes to disk.

    Attributes:
        config: config.json.
        weights: the tensors of the safetensors file.
    """

    family: Family
    model: Any
    config: dict[str, Any]
    weights: dict[str, Tensor]

    def experiment(self, **training: Any) -> Experiment:
        """What its family makes of config.json."""
        return experiment_of(self.family.sections(self.config), **training)

    def ours(self) -> dict[str, Tensor]:
        """Its weights under our names."""
        found: dict[str, Tensor] = {}
        for group in self.family.groups(self.experiment()):
            values = group.to_ours([self.weights[name] for name in group.theirs])
            found |= dict(zip(group.ours, values, strict=True))
        return found

    def gradients(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [b, s, v], and the gradients of `loss_of`, by the names of the weights on disk."""
        self.model.zero_grad()
        logits = self.model(tokens, use_cache=False).logits
        loss_of(logits, tokens).backward()
        values = {name: weight.data for name, weight in self.model.named_parameters()}
        for weight in self.model.parameters():
            weight.data = torch.zeros_like(weight) if weight.grad is None else weight.grad
        _, gradients = _saved(self.model)
        for name, weight in self.model.named_parameters():
            weight.data = values[name]
        return logits.detach(), gradients


def experiment_of(sections: dict[str, Any], **training: Any) -> Experiment:
    """With the sections `model` and `moe`, one sequence at a time."""
    sizes = {"train_iters": 1, "global_batch_size": 2, "micro_batch_size": 2, "seq_length": LENGTH}
    return fill(
        Experiment.model_validate(
            {
                "name": "tiny",
                "data": {"kind": "mock"},
                "optimizer": {"lr": 1e-3},
                "training": {**sizes, **training},
                **sections,
            }
        )
    )


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean loss of the next tokens."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@functools.cache
def tiny(name: str) -> Tiny:
    """The model of a case, with weights of which none is 0 or 1."""
    from transformers import AutoConfig, AutoModelForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    case = CASES[name]
    kind = "mixtral" if case.family == "skywork_moe" else case.family
    sizes = LATENT if kind.startswith("deepseek") else SIZES
    special = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    config = AutoConfig.for_model(kind, **{**sizes, **special, **case.keys}, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).float()
    _randomize(model)
    _FINISH.get(case.family, lambda model: None)(model)
    written, weights = _saved(model)
    if case.family == "skywork_moe":
        _as_skywork(written)
    if case.family == "deepseek_v3" and written["num_nextn_predict_layers"]:
        weights |= _further_layer(weights, written["num_hidden_layers"])
    return Tiny(FAMILIES[case.family], model, written, weights)


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.2 * noise if "norm" in name else 0.25 * noise)


def _saved(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors that a model writes."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads(Path(folder, "config.json").read_text())
        return config, load_file(Path(folder, "model.safetensors"))


def _normalize_gates(model: Any) -> None:
    """What Skywork-MoE's inference code does to Mixtral's router: logits over their standard deviation."""

    def forward(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.size(-1)), router.weight)
        logits = logits / (logits.std(dim=1, keepdim=True) / 1.5)
        weights, experts = logits.softmax(-1).topk(router.top_k)
        return logits, weights / weights.sum(-1, keepdim=True), experts

    for layer in model.model.layers:
        layer.mlp.gate.forward = types.MethodType(forward, layer.mlp.gate)


def _as_skywork(config: dict[str, Any]) -> None:
    """The published spelling of config.json."""
    config["architectures"] = ["SkyworkForCausalLM"]
    config["num_experts"] = [config.pop("num_local_experts")]
    config |= {"moe_use_logits_norm": True, "moe_gate_norm_std": 1.5, "moe_2layer_gate": False}
    config |= {"moe_expert_interval": 1, "moe_feature_no_mul_topk": True, "moe_use_skywork_gating": True}
    del config["router_jitter_noise"]


def _further_layer(weights: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The multi-token-prediction layer as DeepSeek publishes it; transformers neither reads nor writes it."""
    last, ours = f"model.layers.{layer - 1}.", f"model.layers.{layer}."
    found = {ours + name.removeprefix(last): 0.5 * x for name, x in weights.items() if name.startswith(last)}
    hidden = weights["model.norm.weight"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        found[f"{ours}{name}.weight"] = hidden + 0.1
    found[f"{ours}eh_proj.weight"] = torch.randn(
        len(hidden), 2 * len(hidden), generator=torch.Generator().manual_seed(9)
    )
    found[f"{ours}embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    found[f"{ours}shared_head.head.weight"] = weights["lm_head.weight"]
    return found


_FINISH: dict[str, Callable[[Any], None]] = {"skywork_moe": _normalize_gates}
