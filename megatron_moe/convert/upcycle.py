"""`megatron-moe upcycle`: a mixture of experts from a dense model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.convert.checkpoint_output import write_checkpoint
from megatron_moe.convert.importing import DTYPES, STARTER
from megatron_moe.convert.merging import Cast
from megatron_moe.convert.models import Model, open_model
from megatron_moe.convert.starter import starter_yaml
from megatron_moe.convert.upcycling import Upcycled
from megatron_moe.convert.upcycling_experiment import with_experts
from megatron_moe.convert.upcycling_rules import Changes, advice
from megatron_moe.convert.weights import Weights
from megatron_moe.plan.costs.parameters import FORMULA, count_parameters, flops_per_token

_OPTIONS = {
    "moe.num_moe_experts": "--experts",
    "moe.moe_router_topk": "--top-k",
    "moe.moe_ffn_hidden_size": "--granularity",
}
"""Keys that options of the command decide."""


def mixture_of(
    dense: Experiment, experts: int, granularity: int, top_k: int | None, overrides: Sequence[str]
) -> Experiment:
    """The experiment of the mixture: `experts` slices of 1 / granularity of each dense layer, of which a
    token passes `top_k`. Raises InputError."""
    if problems := list(_misplaced(overrides)):
        raise InputError(*problems)
    width = dense.model.ffn_hidden_size
    assert width is not None
    if width % granularity:
        raise InputError(
            f"--granularity {granularity}: does not divide the dense layers' inner width {width}; "
            f"{_nearest_divisor(width, granularity)} does"
        )
    chosen = min(2 * granularity, experts) if top_k is None else top_k
    settings = {
        "num_moe_experts": experts,
        "moe_router_topk": chosen,
        "moe_ffn_hidden_size": width // granularity,
    }
    return with_experts(dense, [*(f"moe.{key}={value}" for key, value in settings.items()), *overrides])


def _misplaced(overrides: Sequence[str]) -> Iterator[str]:
    for key in (override.partition("=")[0].strip() for override in overrides):
        if option := _OPTIONS.get(key):
            yield f"override {key}: is what {option} says; leave it out"
        elif key and not key.startswith("moe."):
            yield f"override {key}: is no key of the mixture, such as moe.moe_layer_freq; leave it out"


def upcycle_model(
    source: Path,
    out: Path,
    *,
    experts: int,
    granularity: int,
    top_k: int | None,
    changes: Changes,
    overrides: Sequence[str] = (),
    dtype: str | None = None,
    workers: int | None = None,
) -> None:
    """Write the mixture made of the dense model at `source` to the checkpoint folder `out`, and say what it
    is.

    Raises InputError.
    """
    began = time.monotonic()
    model = open_model(source)
    after = mixture_of(model.experiment, experts, granularity, top_k, overrides)
    after = after.model_copy(update={"name": f"{model.experiment.name}-moe"})
    weights: Weights = Upcycled(model.weights, model.experiment, after, changes)
    if dtype is not None:
        weights = Cast(weights, DTYPES[dtype])
    origin = f"A mixture of experts made of {model.experiment.name}"
    size = write_checkpoint(
        out,
        after,
        weights,
        came_with=model.huggingface,
        about={"upcycled": {"from": model.experiment.name, **asdict(changes)}},
        texts={STARTER: starter_yaml(_companions(model), after, _sections(after), origin)},
        workers=workers,
    )
    before, made = (count_parameters(experiment) for experiment in (model.experiment, after))
    assert after.moe is not None
    print(
        f"{out}: {made.total / 1e6:,.1f} M parameters, {made.active / 1e6:,.1f} M active, from "
        f"{before.total / 1e6:,.1f} M; {size / 1e9:,.2f} GB in {time.monotonic() - began:,.1f} s"
    )
    print(_first_step(after, changes))
    print(f"To train it, say on what in {out / STARTER}, and start: megatron-moe train {out / STARTER}")


def advise(
    source: Path,
    *,
    experts: int,
    granularity: int,
    top_k: int | None,
    dense_tokens: float,
    moe_tokens: float,
    overrides: Sequence[str] = (),
) -> None:
    """Print whether to upcycle or to train from scratch, and the compute that this follows from."""
    dense = open_model(source).experiment
    after = mixture_of(dense, experts, granularity, top_k, overrides)
    dense_flops, moe_flops = dense_tokens * flops_per_token(dense), moe_tokens * flops_per_token(after)
    print(advice(dense_flops, moe_flops))
    print(
        f"  C_dense: {dense_flops:.3g} FLOP, {dense_tokens:.3g} tokens of {flops_per_token(dense):.3g} each"
    )
    print(f"  C_MoE:   {moe_flops:.3g} FLOP, {moe_tokens:.3g} tokens of {flops_per_token(after):.3g} each")
    print(f"  FLOPs a token: {FORMULA}.")
    print("  The rule is Skywork-MoE's (arXiv 2406.06563, section 3).")


def _first_step(after: Experiment, changes: Changes) -> str:
    moe = after.moe
    assert moe is not None
    if changes.noise or changes.reinitialized:
        return "Its experts differ from the dense layers by what was drawn: so do its first logits."
    if moe.moe_expert_capacity_factor is not None:
        return "Its first logits are those of the dense model, but for tokens that are dropped."
    return "Its first logits are those of the dense model."


def _companions(model: Model) -> Path:
    return model.folder if model.huggingface is None else model.huggingface


def _sections(experiment: Experiment) -> dict[str, Any]:
    """What of the model is not as by default."""
    assert experiment.moe is not None
    sections = {"model": experiment.model, "moe": experiment.moe}
    return {
        name: section.model_dump(mode="json", exclude_defaults=True) for name, section in sections.items()
    }


def _nearest_divisor(width: int, wanted: int) -> int:
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: (abs(d - wanted), d))
