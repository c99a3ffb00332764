"""What limits a planned run, in words."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from megatron_moe.plan.forecast import Forecast, RankForecast
from megatron_moe.plan.wording import memory, percent

_WORTH_SAYING = 0.05
"""Parts of an iteration below this limit nothing."""
_TIGHT = 0.05
"""A rank with less of its memory left is close to the limit."""


def limits_of(forecast: Forecast, num_microbatches: int, launched_s: float = 0.0) -> tuple[str, ...]:
    """A sentence for each thing that costs much, what does not fit first.

    Args:
        launched_s: of an iteration, on the rank with most, passes through layers that take as long as the
            host takes to launch their kernels.
    """
    sentences = [*_memory(forecast)]
    parts = [
        *_slowest_rank(forecast, num_microbatches),
        *_bubble(forecast, num_microbatches),
        *_waits(forecast),
        _launching(forecast, launched_s),
    ]
    sentences += [text for share, text in sorted(parts, reverse=True) if share >= _WORTH_SAYING]
    return tuple(sentences) or (_computation(forecast, num_microbatches),)


def _computation(forecast: Forecast, num_microbatches: int) -> str:
    """No part is worth saying; the two of idle time may be it together."""
    idle = forecast.bubble * forecast.pipeline_s / forecast.iteration_s
    if idle < _WORTH_SAYING:
        return "Nothing but computation: no wait takes 5 % of an iteration."
    ((uneven, _),) = _slowest_rank(forecast, num_microbatches)
    return (
        f"Computation most of all. Ranks are idle for {percent(idle)} of an iteration: for "
        f"{percent(idle - uneven)} while the pipeline fills and drains, for {percent(uneven)} because some "
        "compute longer than others."
    )


def _memory(forecast: Forecast) -> Iterator[str]:
    lacking = [rank for rank in forecast.ranks if (rank.memory.headroom or 0) < 0]
    if lacking:
        worst = min(lacking, key=_headroom)
        others = f", and {len(lacking) - 1} more lack less" if len(lacking) > 1 else ""
        yield (
            f"It does not fit: pipeline rank {worst.pipeline_rank} needs "
            f"{memory(-_headroom(worst))} more{others}."
        )
        return
    known = [rank for rank in forecast.ranks if rank.memory.headroom is not None]
    if known:
        least = min(known, key=_headroom)
        limit = least.memory.limit
        assert limit is not None
        if _headroom(least) < _TIGHT * limit:
            yield (
                f"Memory is tight: pipeline rank {least.pipeline_rank} has "
                f"{memory(_headroom(least))} of {memory(limit)} left."
            )


def _headroom(rank: RankForecast) -> float:
    assert rank.memory.headroom is not None
    return rank.memory.headroom


def _slowest_rank(forecast: Forecast, num_microbatches: int) -> Iterator[tuple[float, str]]:
    times = [rank.forward_s + rank.backward_s for rank in forecast.ranks]
    slowest = times.index(max(times))
    above = max(times) / fmean(times) - 1
    share = num_microbatches * (max(times) - fmean(times)) / forecast.iteration_s
    yield (
        share,
        f"Pipeline rank {slowest} computes {percent(above)} longer than the mean, and the others wait for "
        "it.",
    )


def _bubble(forecast: Forecast, num_microbatches: int) -> Iterator[tuple[float, str]]:
    """What filling and draining the pipeline costs, apart from uneven stages."""
    slowest = max(rank.forward_s + rank.backward_s for rank in forecast.ranks)
    filling = max(0.0, forecast.pipeline_s - num_microbatches * slowest)
    share = filling / forecast.iteration_s
    more = "more microbatches, fewer stages or parallel.virtual_pipeline_model_parallel_size"
    yield (
        share,
        f"Filling and draining the pipeline takes {percent(share)} of an iteration with "
        f"{num_microbatches:,} microbatch{'es' * (num_microbatches != 1)}: {more} would shorten it.",
    )


def _launching(forecast: Forecast, launched_s: float) -> tuple[float, str]:
    share = launched_s / forecast.iteration_s
    return (
        share,
        f"For {percent(share)} of an iteration layers take as long as the host takes to launch their "
        "kernels, which are too small to keep the device busy: a larger training.micro_batch_size, or less "
        "tensor and expert parallelism, would make them larger.",
    )


def _waits(forecast: Forecast) -> Iterator[tuple[float, str]]:
    waits = {
        "The experts' exchange of tokens, as far as nothing hides it,": forecast.exposed_all_to_all_s,
        "Reducing gradients and gathering weights over the replicas": forecast.gradient_s,
        "The optimizer's update": forecast.optimizer_s,
    }
    for name, seconds in waits.items():
        share = seconds / forecast.iteration_s
        yield share, f"{name} takes {percent(share)} of an iteration."
