"""What may be set for inference, and what of training is left behind."""

from __future__ import annotations

import pytest
from experiments import MOE, experiment

from megatron_moe.config.errors import InputError
from megatron_moe.inference.layout import inference_experiment

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["parallel.context_parallel_size=2"], "context_parallel_size: is not for inference"),
        (["parallel.virtual_pipeline_model_parallel_size=2"], "is not for inference; chunks"),
        (["optimizer.lr=1"], "override optimizer.lr: is not for inference; only the layout"),
        (["training.lr=1"], "unknown key"),
        ([f"{TP}=many"], "must be a whole number"),
        ([f"{TP}=4"], "use a tensor_model_parallel_size of at most 3"),
        (["parallel.expert_model_parallel_size=3"], "moe.num_moe_experts: 4 is not divisible"),
        ([f"{PP}=5"], "model.num_layers"),
        ([f"{PP}=2", "pipeline.layers_per_stage=[3,2]"], "adds up to 5 layers"),
        ([f"{PP}=2", "pipeline.layers_per_stage=auto"], "give it a list"),
    ],
)
def test_a_layout_that_cannot_be_is_told(overrides: list[str], problem: str) -> None:
    model = experiment(model={"num_attention_heads": 9, "num_query_groups": 3, "kv_channels": 4})
    with pytest.raises(InputError) as error:
        inference_experiment(model, overrides)
    assert problem in str(error.value)


def test_nothing_of_training_decides_what_is_generated() -> None:
    trained = experiment(
        {**MOE, "moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
        model={"mtp_num_layers": 1},
        parallel={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        recompute={"granularity": "full"},
    )
    found = inference_experiment(trained)
    assert found.moe is not None
    assert found.moe.moe_eval_capacity_factor is None
    assert found.model.mtp_num_layers == 0
    assert found.recompute.granularity == "none"
    assert found.parallel.tensor_model_parallel_size == found.parallel.pipeline_model_parallel_size == 1


def test_layers_that_do_not_come_out_even_are_dealt_out() -> None:
    assert inference_experiment(experiment(), [f"{PP}=3"]).pipeline.layers_per_stage == [2, 1, 1]
