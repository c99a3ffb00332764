"""`resolved.yaml` reads back to the experiment that it was written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from experiment_files import MOE, loaded
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.dump import flow, to_yaml
from megatron_moe.config.loading import load
from megatron_moe.config.schema import Cluster
from megatron_moe.config.yaml_tree import parse

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
)


@given(VALUES)
def test_any_value_reads_back(value: Any) -> None:
    read = parse(f"key: {flow(value)}", "f.yaml")
    assert read.problems == []
    assert read.values == {"key": value}
    assert type(read.values["key"]) is type(value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optimizer.lr_warmup_fraction=0.25", "optimizer.lr=1e-7"],
        ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
        ["model.megatron_core={qk_l2_norm: true, no_rope_freq: [0, 1, 1, 1], rotary_interleaved: true}"],
        ["moe=null"],
        ["data.kind=pretraining", "data.prepare={input: ['a b: #c.txt', ' ü\"\\.txt', 'null']}"],
        ["name=1e5", "moe.moe_layer_freq=[0, 1, 0, 1]"],
    ],
)
def test_resolved_text_reloads_to_an_equal_experiment(tmp_path: Path, overrides: list[str]) -> None:
    overrides = [o.replace("name=1e5", "name='1e5'") for o in overrides]
    first = loaded(tmp_path, MOE, *overrides).experiment
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(first), encoding="utf-8")
    assert load(resolved).experiment == first


def test_a_layout_can_be_taken_out_of_the_resolved_text(tmp_path: Path) -> None:
    """What was derived from the layout is null again and derived anew, as `verify` does for its one
    process."""
    sizes = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    (tmp_path / "resolved.yaml").write_text(to_yaml(loaded(tmp_path, MOE, *sizes).experiment))
    undone = [
        *(
            f"parallel.{name}=null"
            for name in ("sequence_parallel", "expert_model_parallel_size", "data_parallel_size")
        ),
        "parallel.tensor_model_parallel_size=1",
        "parallel.pipeline_model_parallel_size=1",
        "pipeline.layers_per_stage=null",
        "recompute.layers_per_stage=null",
        *(f"launch.cluster.{name}=null" for name in Cluster.model_fields if name != "preset"),
    ]
    assert load(tmp_path / "resolved.yaml", undone).experiment == loaded(tmp_path, MOE).experiment
