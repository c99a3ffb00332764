"""Names by which Megatron-Core tells what it does."""

from __future__ import annotations

import inspect

import pytest
import torch
from distributed import ranks

from megatron_moe.engine.stopwatch import BACKWARD, FORWARD, GATHER, GRADIENTS, SCHEDULE, Stopwatch


def missing_names() -> list[str]:
    """Names of ours that the installed version's source does not give to a timer."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.pipeline_parallel import p2p_communication, schedules

    modules = (inspect.getmodule(finalize_model_grads), p2p_communication, schedules, distrib_optimizer)
    source = "".join(inspect.getsource(module) for module in modules if module is not None)
    travelling = ("forward-recv", "backward-recv", "forward-send", "backward-send-forward-recv")
    names = (FORWARD, BACKWARD, SCHEDULE, GATHER, *GRADIENTS, *travelling)
    return [name for name in names if f"timers('{name}'" not in source]


@pytest.mark.second_pair
def test_megatron_core_names_what_is_measured():
    assert ranks(1).run(missing_names) == [[]]


def test_spans_lie_where_they_were_measured():
    stopwatch = Stopwatch(torch.device("cpu"))
    stopwatch("outer", log_level=1).start(barrier=True)
    with stopwatch.measure("inner"):
        pass
    stopwatch("outer").stop()
    inner, outer = stopwatch.spans()
    assert (inner.name, outer.name) == ("inner", "outer")
    assert 0 <= outer.begin_s <= inner.begin_s <= inner.end_s <= outer.end_s
