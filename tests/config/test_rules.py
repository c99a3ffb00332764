"""Each rule: an experiment that breaks it, what is said, and a repair that the message proposes."""

from __future__ import annotations

from pathlib import Path

import pytest
from attention_rule_cases import ATTENTION_CASES
from capacity_rule_cases import CAPACITY_CASES
from cluster_rule_cases import CLUSTER_CASES
from data_rule_cases import DATA_CASES
from device_rule_cases import DEVICE_CASES
from dispatch_rule_cases import DISPATCH_CASES
from experiment_files import DENSE, MOE, problems
from finetuning_rule_cases import FINETUNING_CASES
from instruction_rule_cases import INSTRUCTION_CASES
from loss_rule_cases import LOSS_CASES
from mtp_rule_cases import MTP_CASES
from optimizer_rule_cases import OPTIMIZER_CASES
from overlap_rule_cases import OVERLAP_CASES
from position_rule_cases import POSITION_CASES
from recompute_rule_cases import RECOMPUTE_CASES
from router_rule_cases import ROUTER_CASES
from sink_rule_cases import SINK_CASES
from structure_rule_cases import STRUCTURE_CASES
from tokenizer_rule_cases import TOKENIZER_CASES

from megatron_moe.config.rules import RULES

P = "parallel."
TP, PP, CP = P + "tensor_model_parallel_size", P + "pipeline_model_parallel_size", P + "context_parallel_size"
EP, ETP, DP = P + "expert_model_parallel_size", P + "expert_tensor_parallel_size", P + "data_parallel_size"
VPP, SP = P + "virtual_pipeline_model_parallel_size", P + "sequence_parallel"
PREPARED = DENSE.replace("data: {kind: mock, tokenizer: {kind: bytes}}", "data: {prepare: {input: [x.txt]}}")
M = "model.megatron_core."
BIASES = "model.mlp_bias=true"
NO_ROPE = ["model.position_embedding_type=none"]
SIX_HEADS = ["model.num_attention_heads=6", "model.kv_channels=16", "model.ffn_hidden_size=96", f"{SP}=false"]

CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    # rule, experiment, overrides that break it, and that repair it; key that is blamed, words of the message
    (
        "heads_over_tp",
        DENSE,
        [f"{TP}=8"],
        [f"{TP}=4"],
        "model.num_attention_heads",
        f"4 is not divisible by {TP} (8, override)",
    ),
    (
        "heads_over_query_groups",
        DENSE,
        ["model.num_query_groups=3"],
        ["model.num_query_groups=2"],
        "model.num_attention_heads",
        "not divisible by model.num_query_groups",
    ),
    (
        "query_groups_over_tp",
        DENSE,
        [*SIX_HEADS, "model.num_query_groups=2", f"{TP}=3"],
        ["model.num_query_groups=3"],
        "model.num_query_groups",
        f"2 is neither a multiple nor a divisor of {TP} (3, override); use 3, or tensor_model_parallel_size",
    ),
    (
        "query_groups_over_tp",
        DENSE,
        ["model.num_query_groups=1", "model.kv_channels=5", *NO_ROPE, f"{TP}=4"],
        [f"{TP}=1"],
        "model.kv_channels",
        "5 times 2 x model.num_query_groups (1, override) is not divisible by",
    ),
    (
        "biases_of_experts",
        MOE,
        [BIASES, "moe.moe_shared_expert_intermediate_size=32"],
        ["moe.moe_shared_expert_intermediate_size=null"],
        "model.mlp_bias",
        "Megatron-Core's shared experts have no biases",
    ),
    (
        "biases_of_experts",
        MOE,
        [BIASES, "model.hidden_size=50", "model.kv_channels=16", f"{ETP}=4", "moe.moe_ffn_hidden_size=64"],
        ["model.hidden_size=52"],
        "model.hidden_size",
        f"50 is not divisible by {ETP}",
    ),
    (
        "ffn_over_tp",
        DENSE,
        ["model.ffn_hidden_size=90", f"{TP}=4"],
        ["model.ffn_hidden_size=92"],
        "model.ffn_hidden_size",
        "use 88 or 92",
    ),
    (
        "expert_ffn_over_etp",
        MOE,
        ["moe.moe_ffn_hidden_size=33", f"{ETP}=2"],
        ["moe.moe_ffn_hidden_size=34"],
        "moe.moe_ffn_hidden_size",
        "use 32 or 34",
    ),
    (
        "shared_experts_over_tp",
        MOE,
        ["moe.moe_shared_expert_intermediate_size=33", f"{TP}=2"],
        ["moe.moe_shared_expert_intermediate_size=32"],
        "moe.moe_shared_expert_intermediate_size",
        "use 32 or 34",
    ),
    (
        "experts_over_ep",
        MOE,
        ["moe.num_moe_experts=6", f"{EP}=4"],
        ["moe.num_moe_experts=8"],
        "moe.num_moe_experts",
        "6 is not divisible by",
    ),
    (
        "expert_ranks_fold",
        MOE,
        [f"{EP}=4", f"{DP}=2"],
        [f"{DP}=4"],
        EP,
        "which does not divide the 2 ranks of a stage",
    ),
    (
        "ranks_can_be_written_down",
        DENSE,
        [f"{CP}=32", f"{DP}=100000", "training.global_batch_size=100000"],
        [f"{CP}=2"],
        TP,
        "is more than 1,000,000 ranks",
    ),
    (
        "rotary_options",
        DENSE,
        [f"{M}rotary_interleaved=true", *NO_ROPE],
        ["model.position_embedding_type=rope"],
        f"{M}rotary_interleaved",
        "has no effect on positions other than rope",
    ),
    (
        "rotary_options",
        DENSE,
        [f"{M}no_rope_freq=3"],
        [f"{M}no_rope_freq=2"],
        f"{M}no_rope_freq",
        "3 does not divide model.num_layers (4, experiment.yaml:2); use 1, 2 or 4",
    ),
    (
        "rotary_options",
        DENSE,
        [f"{M}no_rope_freq=[0, 1]"],
        [f"{M}no_rope_freq=[0, 1, 0, 1]"],
        f"{M}no_rope_freq",
        "has 2 entries and not one for each",
    ),
    (
        "biases_of_recomputed_layers",
        DENSE,
        [BIASES, "recompute.modules=[mlp]"],
        ["recompute.modules=[core_attn]"],
        "model.mlp_bias",
        "does not go with mlp in recompute.modules",
    ),
    (
        "one_norm_of_queries",
        DENSE,
        ["model.qk_norm=head", f"{M}qk_l2_norm=true"],
        [f"{M}qk_l2_norm=false"],
        "model.qk_norm",
        "has no effect beside",
    ),
    (
        "dense_has_no_experts",
        DENSE,
        [f"{EP}=2"],
        [f"{EP}=1"],
        EP,
        "needs experts, and there is no section moe",
    ),
    ("moe_with_tp_needs_sp", MOE, [f"{TP}=2", f"{SP}=false"], [f"{SP}=true"], SP, "does not go with experts"),
    ("sp_needs_tp", DENSE, [f"{SP}=true"], [f"{SP}=false"], SP, "true needs"),
    (
        "rope_needs_even_width",
        DENSE,
        ["model.kv_channels=15"],
        ["model.kv_channels=16"],
        "model.kv_channels",
        "15 rotated channels",
    ),
    (
        "sequence_over_ranks",
        DENSE,
        [f"{CP}=2", "training.seq_length=66"],
        ["training.seq_length=68"],
        "training.seq_length",
        "use 64 or 68",
    ),
    (
        "sequence_over_ranks",
        DENSE,
        [f"{TP}=4", "training.seq_length=66"],
        [f"{SP}=false"],
        "training.seq_length",
        f"not divisible by {TP} (4, override) under",
    ),
    (
        "sequence_over_ranks",
        DENSE,
        [f"{TP}=4", f"{CP}=2", "training.seq_length=68"],
        ["training.seq_length=64"],
        "training.seq_length",
        "use 64 or 80",
    ),
    (
        "positions_reach_sequence",
        DENSE,
        ["model.max_position_embeddings=63"],
        ["model.max_position_embeddings=64"],
        "model.max_position_embeddings",
        "is less than training.seq_length",
    ),
    (
        "padded_vocab_over_tp",
        DENSE,
        [f"{TP}=2", "model.make_vocab_size_divisible_by=1"],
        ["model.make_vocab_size_divisible_by=2"],
        "model.make_vocab_size_divisible_by",
        "to 257, which is not divisible",
    ),
    (
        "batch_over_replicas",
        DENSE,
        ["training.micro_batch_size=3"],
        ["training.global_batch_size=9"],
        "training.global_batch_size",
        "use a global_batch_size of 6 or 9",
    ),
    (
        "batch_over_replicas",
        DENSE,
        [f"{PP}=2", f"{VPP}=2", "training.global_batch_size=7"],
        ["training.global_batch_size=6"],
        "training.global_batch_size",
        "gives 7 microbatches",
    ),
    ("vpp_needs_pp", DENSE, [f"{VPP}=2"], [f"{PP}=2"], VPP, "2 needs"),
    (
        "stages_add_up",
        DENSE,
        [f"{PP}=2", "pipeline.layers_per_stage=[3, 2]"],
        ["pipeline.layers_per_stage=[3, 1]"],
        "pipeline.layers_per_stage",
        "[3, 2] adds up to 5 layers and not to model.num_layers (4, experiment.yaml:2); for example [2, 2]",
    ),
    (
        "stages_add_up",
        DENSE,
        [f"{PP}=2", "pipeline.layers_per_stage=[4]"],
        ["pipeline.layers_per_stage=[3, 1]"],
        "pipeline.layers_per_stage",
        "makes the number of stages 1 and not 2",
    ),
    (
        "stages_add_up",
        DENSE,
        [f"{PP}=4", "pipeline.layers_per_stage=[0, 4, 0, 0]"],
        ["pipeline.layers_per_stage=[0, 2, 2, 0]"],
        "pipeline.layers_per_stage",
        "leaves stage 3 without a layer, embedding or loss",
    ),
    (
        "recompute_within_stages",
        DENSE,
        ["recompute.layers_per_stage=[1, 1]"],
        ["recompute.layers_per_stage=[1]"],
        "recompute.layers_per_stage",
        "has 2 entries",
    ),
    (
        "recompute_within_stages",
        DENSE,
        [f"{PP}=2", "pipeline.layers_per_stage=[3, 1]", "recompute.layers_per_stage=[0, 3]"],
        ["recompute.layers_per_stage=[3, 1]"],
        "recompute.layers_per_stage",
        "recomputes 3 layers on pipeline rank 1, which holds 1",
    ),
    (
        "recompute_within_stages",
        DENSE,
        ["recompute.layers_per_stage=[3]", "recompute.method=uniform"],
        ["recompute.method=block"],
        "recompute.layers_per_stage",
        "makes groups of 3 layers",
    ),
    (
        "split_has_training_part",
        DENSE,
        ["data.split=[0, 1]"],
        ["data.split=[1, 0]"],
        "data.split",
        "leaves nothing to train on",
    ),
    (
        "evaluation_has_data",
        PREPARED,
        ["training.eval_interval=5", "data.split=[1, 0]", "data.tokenizer.kind=bytes"],
        ["data.split=[1, 1]"],
        "training.eval_interval",
        "needs a validation part",
    ),
    (
        "data_said_once",
        DENSE,
        ["data.path=x"],
        ["data.path=null"],
        "data.path",
        'is not read under data.kind ("mock", experiment.yaml:3)',
    ),
    (
        "data_said_once",
        DENSE,
        ["data.kind=pretraining"],
        ["data.path=x"],
        "data.path",
        "neither are data.prepare and data.blend; set one of the three",
    ),
    (
        "data_said_once",
        PREPARED,
        ["data.path=x", "data.tokenizer.kind=bytes"],
        ["data.prepare=null"],
        "data.path",
        "are both set",
    ),
    (
        "tokenizer_said_once",
        PREPARED,
        ["data.tokenizer={model: /m, vocab_size: 9}"],
        ["data.tokenizer.model=null"],
        "data.tokenizer.model",
        "keep one of the two",
    ),
    (
        "tokenizer_said_once",
        PREPARED,
        [],
        ["data.tokenizer.vocab_size=300"],
        "data.tokenizer.vocab_size",
        "for example 2048",
    ),
    (
        "tokenizer_said_once",
        PREPARED,
        ["data.prepare=null", "data.path=x"],
        ["data.tokenizer.kind=bytes"],
        "data.tokenizer.model",
        "(null, override) to train one on",
    ),
    (
        "megatron_core_fields",
        DENSE,
        ["model.megatron_core.fp8_margin=1"],
        [],
        "model.megatron_core.fp8_margin",
        "needs Transformer Engine",
    ),
    *ATTENTION_CASES,
    *CAPACITY_CASES,
    *CLUSTER_CASES,
    *DATA_CASES,
    *OPTIMIZER_CASES,
    *FINETUNING_CASES,
    *TOKENIZER_CASES,
    *DEVICE_CASES,
    *DISPATCH_CASES,
    *INSTRUCTION_CASES,
    *OVERLAP_CASES,
    *POSITION_CASES,
    *RECOMPUTE_CASES,
    *ROUTER_CASES,
    *LOSS_CASES,
    *MTP_CASES,
    *SINK_CASES,
    *STRUCTURE_CASES,
]


@pytest.mark.parametrize(("rule", "text", "broken", "repaired", "key", "words"), CASES)
def test_rule(
    tmp_path: Path, rule: str, text: str, broken: list[str], repaired: list[str], key: str, words: str
) -> None:
    found = problems(tmp_path, text, broken)
    assert len(found) == 1, found
    assert f"{key}: " in found[0]
    assert words in found[0]
    assert "; " in found[0], "it says what would work"
    if repaired:
        assert problems(tmp_path, text, [*broken, *repaired]) == []


def test_every_rule_has_a_case() -> None:
    tested = {case[0] for case in CASES} | {"megatron_core_supported"}
    assert {rule.__name__ for rule in RULES} == tested


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.16.0", False), ("0.16.1", True), ("0.19.2", True), ("0.20.0rc1", False), ("1.0", False)],
)
def test_supported_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, supported: bool
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    found = problems(tmp_path, DENSE)
    assert (found == []) is supported
    assert supported or (version in found[0] and "pip install 'megatron-core>=0.16.1,<0.20'" in found[0])


def test_ffn_size_is_free_where_every_layer_is_moe(tmp_path: Path) -> None:
    sizes = [f"{TP}=4", "model.ffn_hidden_size=90", "moe.moe_ffn_hidden_size=90"]
    assert problems(tmp_path, MOE, sizes) == []
    assert len(problems(tmp_path, MOE, [*sizes, "moe.moe_layer_freq=2"])) == 1


def test_recompute_counts_within_the_largest_chunk_of_a_rank(tmp_path: Path) -> None:
    chunks = [f"{PP}=2", f"{VPP}=2", "pipeline.layers_per_stage=[1, 1, 1, 1]"]
    assert problems(tmp_path, DENSE, [*chunks, "recompute.layers_per_stage=[1, 0]"]) == []
    assert len(problems(tmp_path, DENSE, [*chunks, "recompute.layers_per_stage=[2, 0]"])) == 1
