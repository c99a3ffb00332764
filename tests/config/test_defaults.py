"""Derived defaults, against what the schema's docstrings promise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from experiment_files import DENSE, MOE, loaded, problems
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.defaults import divisors_of, fill, nearest_multiples
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import Experiment

TP, PP, EP, ETP, DP, CP, VPP = (
    f"parallel.{name}_parallel_size"
    for name in (
        "tensor_model",
        "pipeline_model",
        "expert_model",
        "expert_tensor",
        "data",
        "context",
        "virtual_pipeline_model",
    )
)


def test_defaults_of_a_dense_model(tmp_path: Path) -> None:
    e = loaded(tmp_path, DENSE).experiment
    assert (e.model.num_query_groups, e.model.kv_channels, e.model.ffn_hidden_size) == (4, 16, 256)
    assert (e.model.vocab_size, e.model.max_position_embeddings) == (257, 64)
    assert e.pipeline.layers_per_stage == [4]
    assert e.recompute.layers_per_stage == [0]
    assert (e.optimizer.lr_decay_iters, e.optimizer.lr_warmup_iters) == (10, 0)
    p = e.parallel
    sizes = (
        p.virtual_pipeline_model_parallel_size,
        p.expert_model_parallel_size,
        p.expert_tensor_parallel_size,
    )
    assert sizes == (1, 1, 1)
    assert (p.data_parallel_size, p.sequence_parallel) == (1, False)


@pytest.mark.parametrize(
    ("said", "granularity", "modules", "counts"),
    [
        ([], "none", [], [0, 0]),
        (["layers_per_stage=[0, 1]"], "full", [], [0, 1]),
        (["granularity=full"], "full", [], [1, 2]),
        (["granularity=full", "method=uniform"], "full", [], [1, 1]),
        (["granularity=selective"], "selective", ["core_attn"], [0, 0]),
        (["modules=[layernorm]"], "selective", ["layernorm"], [0, 0]),
    ],
)
def test_recompute_follows_from_what_is_said_of_it(
    tmp_path: Path, said: list[str], granularity: str, modules: list[str], counts: list[int]
) -> None:
    uneven = [
        f"{PP}=2",
        f"{VPP}=2",
        "pipeline.layers_per_stage=[1, 2, 1, 0]",
    ]
    r = loaded(tmp_path, DENSE, *uneven, *(f"recompute.{key}" for key in said)).experiment.recompute
    assert (r.granularity, r.modules, r.layers_per_stage) == (granularity, modules, counts)


def test_experts_lie_over_the_tensor_parallel_ranks(tmp_path: Path) -> None:
    e = loaded(tmp_path, MOE, f"{TP}=2", f"{PP}=2", "model.ffn_hidden_size=96").experiment
    p = e.parallel
    assert (p.expert_model_parallel_size, p.expert_tensor_parallel_size, p.data_parallel_size) == (2, 1, 1)
    assert p.sequence_parallel is True
    assert e.moe is not None
    assert e.moe.moe_ffn_hidden_size == 96
    assert e.pipeline.layers_per_stage == [2, 2]
    assert e.recompute.layers_per_stage == [0, 0]
    dense = loaded(tmp_path, DENSE, f"{TP}=2").experiment
    assert dense.parallel.expert_model_parallel_size == 1


@given(
    tp=st.sampled_from([1, 2, 4]),
    cp=st.sampled_from([1, 2, 4]),
    ep=st.sampled_from([1, 2, 4, 8]),
    etp=st.sampled_from([1, 2, 4]),
)
def test_alone_the_replicas_are_the_fewest_that_the_experts_allow(
    tp: int, cp: int, ep: int, etp: int
) -> None:
    e = fill(experiment(tp=tp, cp=cp, ep=ep, etp=etp))
    fewest = next(dp for dp in range(1, 1000) if tp * cp * dp % (ep * etp) == 0)
    assert e.parallel.data_parallel_size == fewest


def experiment(tp: int, cp: int, ep: int, etp: int) -> Experiment:
    """An experiment with these sizes, nothing filled."""
    return Experiment.model_validate(
        {
            "name": "x",
            "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100},
            "moe": {"num_moe_experts": 8},
            "parallel": {
                "tensor_model_parallel_size": tp,
                "context_parallel_size": cp,
                "expert_model_parallel_size": ep,
                "expert_tensor_parallel_size": etp,
            },
            "training": {"train_iters": 1, "global_batch_size": 64, "seq_length": 64},
        }
    )


def test_under_a_launcher_the_replicas_follow_from_the_ranks(tmp_path: Path) -> None:
    assert loaded(tmp_path, MOE, f"{TP}=2", world_size=8).experiment.parallel.data_parallel_size == 4
    assert (
        loaded(tmp_path, MOE, f"{TP}=2", f"{DP}=4", world_size=8).experiment.parallel.data_parallel_size == 4
    )


def test_ranks_that_contradict_the_layout(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, MOE, [f"{TP}=2", f"{DP}=2"], world_size=8)
    assert line == (
        f"override {DP}: 2 times {TP} (2, override) times {PP} (1, default) times {CP} (1, default) "
        "is not 8, the number of ranks; set 4, leave it out, or start 4 ranks"
    )
    (line,) = problems(tmp_path, MOE, [f"{TP}=2", f"{PP}=2"], world_size=6)
    assert line.startswith(f"override {TP}: 2 times {PP} (2, override) times {CP} (1, default) is 4")
    assert line.endswith("; start 4 or 8 ranks, or make these three multiply to a divisor of 6")
    with pytest.raises(ConfigError):
        fill(loaded(tmp_path, MOE, f"{TP}=2").experiment, world_size=4)


def test_warm_up_as_a_part_of_the_run(tmp_path: Path) -> None:
    for iterations, warmup in ((1000, 50), (1, 0), (30, 2)):
        o = loaded(
            tmp_path, DENSE, f"training.train_iters={iterations}", "optimizer.lr_warmup_fraction=0.05"
        ).experiment.optimizer
        assert (o.lr_decay_iters, o.lr_warmup_iters) == (iterations, warmup)


def test_the_vocabulary_follows_the_tokenizer(tmp_path: Path) -> None:
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "spm"), vocab_size=30, minloglevel=2
    )
    text = DENSE.replace("kind: bytes", "kind: sentencepiece")
    tokenizer = "data.tokenizer"
    assert loaded(tmp_path, text, f"{tokenizer}.vocab_size=999").experiment.model.vocab_size == 999
    assert loaded(tmp_path, text, f"{tokenizer}.model={tmp_path}/spm.model").experiment.model.vocab_size == 30
    assert loaded(tmp_path, text, "model.vocab_size=77").experiment.model.vocab_size == 77
    (line,) = problems(tmp_path, text, [f"{tokenizer}.model={corpus}"])
    assert "gives no model.vocab_size: not a sentencepiece model" in line
    (line,) = problems(tmp_path, text, [f"{tokenizer}.model={tmp_path}/none.model"])
    assert "gives no model.vocab_size: cannot read the sentencepiece model: No such file" in line
    (line,) = problems(tmp_path, text, [f"{tokenizer}.model={tmp_path}"])
    assert "is a folder; name the file of the sentencepiece model in it" in line and "spm.model" in line
    (line,) = problems(tmp_path, text)
    assert line.startswith("experiment.yaml:2: model.vocab_size: is not set and no tokenizer gives it")


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        ([f"{PP}=3"], "use 3 or 6 layers, or say the split: pipeline.layers_per_stage: [2, 1, 1], or auto"),
        ([f"{PP}=8"], "use at least 8 layers, or fewer stages"),
        (
            ["model.num_layers=6", f"{PP}=2", f"{VPP}=2"],
            "use 4 or 8 layers, or say the split: pipeline.layers_per_stage: [2, 2, 1, 1], or auto",
        ),
    ],
)
def test_layers_that_do_not_divide_are_never_rounded(
    tmp_path: Path, overrides: list[str], advice: str
) -> None:
    (line,) = problems(tmp_path, DENSE, overrides)
    assert "layers do not divide evenly over" in line
    assert line.endswith(advice)


def test_heads_that_do_not_divide_the_width(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, DENSE, ["model.num_attention_heads=6"])
    assert "64 is not divisible by model.num_attention_heads (6, override)" in line
    assert "use a hidden_size of 60 or 66" in line
    assert problems(tmp_path, DENSE, ["model.num_attention_heads=6", "model.kv_channels=10"]) == []


@given(st.integers(1, 10**6), st.integers(1, 1000))
def test_proposed_values_divide(value: int, by: int) -> None:
    assert all(int(proposed) % by == 0 for proposed in nearest_multiples(value, by).split(" or "))
    assert all(value % int(divisor) == 0 for divisor in divisors_of(value).replace(" or ", ", ").split(", "))
    assert math.gcd(value, by) == by or str(value) not in nearest_multiples(value, by).split(" or ")
