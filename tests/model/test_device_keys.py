"""Keys for Transformer Engine and GPUs reach Megatron-Core's configs, and only where they are set."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from experiments import MOE, experiment, layout

from megatron_moe.engine.optimizer import optimizer_config
from megatron_moe.model.transformer_config import transformer_config
from megatron_moe.plan import plan as plans

TE = {"model": {"spec": "transformer_engine"}}
KERNELS = (
    "fused_permute",
    "fused_permute_with_probs",
    "fused_sort_chunks_by_index",
    "fused_sort_chunks_by_index_with_probs",
    "fused_unpermute",
)


def transformer(**sections: Any) -> Any:
    setup = experiment(sections.pop("moe", MOE), **sections)
    return transformer_config(setup, plans.make(setup), 0, torch.bfloat16)


def optimizer(**settings: Any) -> Any:
    training = settings.pop("training", {})
    parallel = settings.pop("parallel", {})
    setup = experiment(optimizer={"lr": 1e-3, **settings}, training=training, parallel=parallel, **TE)
    return optimizer_config(setup, torch.bfloat16)


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for what Megatron-Core looks for in Transformer Engine when it checks its configs."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer import optimizer_config as optimizer_module
    from megatron.core.transformer import transformer_config as transformer_module
    from megatron.core.transformer.moe import moe_utils

    class FusedAdam:
        def __init__(
            self,
            master_weight_dtype: Any,
            exp_avg_dtype: Any,
            exp_avg_sq_dtype: Any,
            use_decoupled_grad: bool,
        ) -> None: ...

    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[name], "FusedAdam", FusedAdam, raising=False)
    for module in (optimizer_module, transformer_module):
        monkeypatch.setattr(module, "is_te_min_version", lambda version: True)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", lambda *args: None)
    for kernel in KERNELS:
        monkeypatch.setattr(moe_utils, kernel, lambda *args: None, raising=False)
    yield


ROWS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # sections of the experiment -> fields of TransformerConfig
    ({"training": {"gradient_accumulation_fusion": True}}, {"gradient_accumulation_fusion": True}),
    (
        {**TE, "training": {"fp8": "hybrid", "fp8_recipe": "tensorwise"}},
        {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    ),
    (
        {**TE, "recompute": {"cpu_offloading_num_layers": 2}},
        {"cpu_offloading": True, "cpu_offloading_num_layers": 2},
    ),
    ({"model": {"apply_rope_fusion": True}}, {"apply_rope_fusion": True}),
    ({"moe": {**MOE, "moe_permute_fusion": True}}, {"moe_permute_fusion": True}),
    (
        {
            "moe": {**MOE, "moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"},
            "parallel": layout(tp=2),
        },
        {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"},
    ),
]


@pytest.mark.second_pair
@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize(("sections", "fields"), ROWS, ids=lambda value: next(iter(value)))
def test_fields_of_the_model(sections: dict[str, Any], fields: dict[str, Any]) -> None:
    made, plain = transformer(**sections), transformer()
    assert {name: getattr(made, name) for name in fields} == fields
    assert {name: getattr(plain, name) for name in fields} != fields


@pytest.mark.second_pair
@pytest.mark.usefixtures("transformer_engine")
def test_fields_of_the_optimizer() -> None:
    plain = optimizer()
    assert not plain.use_precision_aware_optimizer and not plain.optimizer_cpu_offload
    assert plain.fp8_recipe is None
    assert optimizer(training={"fp8": "e4m3", "fp8_recipe": "blockwise"}).fp8_recipe == "blockwise"

    small = optimizer(
        use_precision_aware_optimizer=True,
        main_grads_dtype="bf16",
        exp_avg_dtype="fp8",
        exp_avg_sq_dtype="fp16",
        parallel={"grad_reduce_in_fp32": False},
    )
    assert small.use_precision_aware_optimizer and small.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    dtypes = (small.main_grads_dtype, small.exp_avg_dtype, small.exp_avg_sq_dtype)
    assert dtypes == (torch.bfloat16, torch.uint8, torch.float16)

    moved = optimizer(optimizer_cpu_offload=True, optimizer_offload_fraction=0.25)
    assert moved.optimizer_cpu_offload and moved.optimizer_offload_fraction == 0.25


@pytest.mark.second_pair
def test_offloading_needs_no_transformer_engine() -> None:
    assert optimizer(optimizer_cpu_offload=True).use_precision_aware_optimizer
