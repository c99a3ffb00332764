"""Hold what the planner foretells against published runs, for the table of docs/planner.md.

    python tools/validate_planner.py

Each run is a recipe of configs/ with the layout of its source, on the preset of its GPUs: one set of figures
for all runs on one kind of GPU. Tokens a second are compared, because sources count the FLOPs behind an MFU
in different ways; where a source gives none, they follow from what it gives by its own count.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

from rich.box import SIMPLE_HEAD  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from megatron_moe.config.loading import load  # noqa: E402
from megatron_moe.config.schema import Experiment  # noqa: E402
from megatron_moe.plan.costs.parameters import scores_per_token  # noqa: E402
from megatron_moe.plan.plan import Plan, make  # noqa: E402

_KEYS = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "etp": "parallel.expert_tensor_parallel_size",
    "dp": "parallel.data_parallel_size",
}
# Megatron-LM's own blocks are fused, as are the sources' that say so.
_FUSED = (
    "model.spec=transformer_engine",
    "model.apply_rope_fusion=true",
    "training.gradient_accumulation_fusion=true",
)
_13B = (*_FUSED, "pipeline.layers_per_stage=null", "recompute.layers_per_stage=null")
# No source says what Mixtral's runs compute again; without this they would not fit by our count.
_MIXTRAL = (*_FUSED, "recompute.modules=[moe_act]")
# NVIDIA's scripts force even routing here.
_QWEN3 = ("training.gradient_accumulation_fusion=true", "launch.expert_imbalance=1.0")
_ALONE = (*_QWEN3, "moe.overlap_moe_expert_parallel_comm=false")
_ALL_TO_ALL = (
    *_ALONE,
    "moe.moe_token_dispatcher_type=alltoall",
    "moe.moe_permute_fusion=false",
    "pipeline.layers_per_stage=E|(t|)*94L",
)
_ALL_AGAIN = ("recompute.modules=null", "recompute.granularity=full", "training.micro_batch_size=4")


@dataclass(frozen=True)
class Run:
    """A published run.

    Attributes:
        published: the source's figure, in its words.
        overrides: what the run changes in the recipe.
        tokens_per_second: a GPU; None where the source gives an MFU.
        mfu: by the source's count of FLOPs.
        counts: the source's count of FLOPs: the planner's, that with 6 for each weight of the input embedding
            too (6 N + 12 L h s), or that with half of the square of attention scores.
        is_held_out: whether no figure of a preset was chosen by it.
    """

    name: str
    published: str
    recipe: str
    overrides: Sequence[str]
    tokens_per_second: float | None = None
    mfu: float | None = None
    counts: Literal["as planned", "embedding", "causal"] = "as planned"
    is_held_out: bool = False


@dataclass(frozen=True)
class Row:
    """A run, and what the planner foretells of it."""

    run: Run
    plan: Plan
    published: float
    """Tokens a second and GPU, as are the planner's."""
    mfu: float
    """The planner's, by the source's count of FLOPs."""

    @property
    def planned(self) -> float:
        """Tokens a second and GPU."""
        return self.plan.forecast.tokens_per_second_per_gpu

    @property
    def off(self) -> float:
        """By how much the planner is too high."""
        return self.planned / self.published - 1

    @property
    def lacking_gib(self) -> float:
        """Memory that the fullest rank lacks; 0 where all fit."""
        rooms = [rank.memory.headroom or 0.0 for rank in self.plan.forecast.ranks]
        return max(0.0, -min(rooms)) / 2**30


def _layout(**sizes: int) -> tuple[str, ...]:
    return tuple(f"{_KEYS[name]}={size}" for name, size in sizes.items())


def _step(seconds: float, sequences: int = 2048) -> float:
    """Tokens a second and GPU of sequences of 4,096 tokens on 256 GPUs."""
    return sequences * 4096 / seconds / 256


def _h800(name: str, step_s: float, sequences: int, *overrides: str) -> Run:
    """Qwen3-235B on H800 with PP 32 x VPP 3 and EP 8."""
    layout = (*_ALL_TO_ALL, *_layout(pp=32, vpp=3, ep=8), "launch.cluster.preset=h800")
    batch = f"training.global_batch_size={sequences}"
    return Run(
        name=f"Qwen3-235B, H800: {name}",
        published=f"{step_s} s a step",
        recipe="qwen3_235b_a22b",
        overrides=(*layout, batch, *overrides),
        tokens_per_second=_step(step_s, sequences),
        counts="causal",
        is_held_out=True,
    )


RUNS = (
    Run("Skywork-13B: DP 256 x PP 2", "1,873 tok/s, 56.5 %", "skywork_13b", _13B, 1873, counts="embedding"),
    Run(
        "Skywork-13B: DP 128 x PP 4",
        "1,828 tok/s, 55.1 %",
        "skywork_13b",
        (*_13B, *_layout(pp=4, dp=128)),
        1828,
        counts="embedding",
    ),
    Run(
        "Skywork-13B: DP 256 x TP 2",
        "1,775 tok/s, 53.5 %",
        "skywork_13b",
        (*_13B, *_layout(pp=1, tp=2)),
        1775,
        counts="embedding",
    ),
    Run(
        "Skywork-13B: DP 128 x TP 4",
        "1,417 tok/s, 43.1 %",
        "skywork_13b",
        (*_13B, *_layout(pp=1, tp=4, dp=128)),
        1417,
        counts="embedding",
    ),
    Run("Skywork-MoE", "690 tok/s, 38 %", "skywork_moe_146b", _FUSED, 690, counts="embedding"),
    Run("Mixtral 8x22B, folded", "49.3 %", "mixtral_8x22b", _MIXTRAL, mfu=0.493),
    Run(
        "Mixtral 8x22B, not folded",
        "46.3 %",
        "mixtral_8x22b",
        (*_MIXTRAL, *_layout(ep=4, etp=2)),
        mfu=0.463,
    ),
    Run("Qwen2-57B-A14B", "39.0 %", "qwen2_57b_a14b", _FUSED, mfu=0.390),
    Run("Qwen3-235B", "245 TFLOP/s", "qwen3_235b_a22b", _ALONE, _step(19.7), counts="causal"),
    Run(
        "Qwen3-235B, overlap",
        "276 TFLOP/s",
        "qwen3_235b_a22b",
        _QWEN3,
        _step(17.6),
        counts="causal",
    ),
    Run(
        "Mixtral 8x7B",
        "468 TFLOP/s",
        "mixtral_8x7b",
        (*_FUSED, "recompute.modules=null"),
        mfu=468 / 989,
    ),
    Run(
        "Qwen3-235B: TP 4 x EP 8",
        "167 TFLOP/s",
        "qwen3_235b_a22b",
        (*_ALONE, "recompute.modules=null", *_layout(tp=4, ep=8, dp=8)),
        _step(29.0),
        counts="causal",
    ),
    Run(
        "Qwen3-235B: PP 32 x EP 8",
        "200 TFLOP/s",
        "qwen3_235b_a22b",
        (*_ALL_TO_ALL, *_layout(pp=32, vpp=3, ep=8, dp=4)),
        _step(24.2),
        counts="causal",
        is_held_out=True,
    ),
    _h800("TP 1, full", 42.537, 4096, *_ALL_AGAIN, *_layout(tp=1, dp=8)),
    _h800("TP 2, full", 43.495, 4096, *_ALL_AGAIN, *_layout(tp=2, dp=4)),
    _h800("TP 2, norm, act", 22.42, 2048, *_layout(tp=2, dp=4)),
    _h800("TP 1, norm, moe", 22.946, 2048, "recompute.modules=[layernorm, moe]", *_layout(tp=1, dp=8)),
)


def row(run: Run) -> Row:
    """What the planner foretells of a run."""
    experiment = load(REPOSITORY / "configs" / f"{run.recipe}.yaml", run.overrides).experiment
    plan = make(experiment)
    assert experiment.launch.cluster.peak_tflops is not None
    peak, flops = experiment.launch.cluster.peak_tflops * 1e12, _flops_per_token(experiment, plan, run)
    published = run.tokens_per_second
    if published is None:
        assert run.mfu is not None
        published = run.mfu * peak / flops
    return Row(run, plan, published, plan.forecast.tokens_per_second_per_gpu * flops / peak)


def _flops_per_token(experiment: Experiment, plan: Plan, run: Run) -> float:
    model = experiment.model
    if run.counts == "embedding":
        assert model.vocab_size is not None
        return plan.flops_per_token + 6 * model.vocab_size * model.hidden_size
    if run.counts == "causal":
        return plan.flops_per_token - 3 * scores_per_token(experiment) * model.num_layers / 2
    return plan.flops_per_token


def main() -> None:
    """Print the table."""
    table = Table(box=SIMPLE_HEAD)
    for title in ("run", "GPUs", "published", "tok/s", "planned", "off", "MFU", "lacks GiB"):
        table.add_column(title, justify="left" if title in ("run", "published") else "right", no_wrap=True)
    for found in map(row, RUNS):
        table.add_row(
            found.run.name,
            f"{found.plan.layout.world_size:,}",
            found.run.published,
            f"{found.published:,.0f}",
            f"{found.planned:,.0f}",
            f"{found.off:+.1%}",
            f"{found.mfu:.1%}",
            f"{found.lacking_gib:.1f}" if found.lacking_gib else "",
        )
    Console(width=130).print(table)
    print("MFU: the planner's, by the source's count. docs/planner.md says what each source leaves open.")


if __name__ == "__main__":
    main()
