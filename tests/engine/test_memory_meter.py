"""What is counted of memory, against tensors of known size."""

from __future__ import annotations

import pytest
import torch

from megatron_moe.engine.memory import MOMENT, HostMeter

MEBI = 2**20


def tensor(mebibytes: int) -> torch.Tensor:
    return torch.ones(mebibytes * MEBI // 4)


@pytest.fixture
def meter():
    made = HostMeter()
    made.start()
    yield made
    made.stop()


@pytest.mark.second_pair
def test_live_and_most_bytes_between_readings(meter):
    first = tensor(8)
    second = tensor(4)
    del first
    assert (meter.read().live, meter.read().peak) == (4 * MEBI, 4 * MEBI)
    third = tensor(16)
    reading = meter.read()
    assert (reading.live, reading.peak) == (20 * MEBI, 20 * MEBI)
    del second, third
    reading = meter.read()
    assert (reading.live, reading.peak) == (0, 20 * MEBI)


@pytest.mark.second_pair
def test_what_an_operation_needs_inside_counts(meter):
    weight = torch.nn.Parameter(torch.ones(512, 512))  # 1 MiB
    loss = (weight * 2).exp().sum()
    held = meter.read()
    # exp keeps its output, the product only what it needs: nothing but a number.
    assert held.live == pytest.approx(2 * MEBI, abs=4096)
    assert held.peak == pytest.approx(3 * MEBI, abs=4096)
    loss.backward()
    # Its gradient, and the weight itself.
    assert meter.read().live == pytest.approx(2 * MEBI, abs=4096)


@pytest.mark.second_pair
def test_moments_have_readings_of_their_own(meter):
    first = tensor(2)
    with torch.profiler.record_function(MOMENT + "between"):
        pass
    del first
    second = tensor(1)
    names, readings = zip(*meter.moments(), strict=True)
    assert names == ("between", "")
    assert [reading.live for reading in readings] == [2 * MEBI, MEBI]
    assert [reading.peak for reading in readings] == [2 * MEBI, 2 * MEBI]
    assert second.numel()


def test_a_meter_can_be_started_again():
    for _ in range(2):
        made = HostMeter()
        made.start()
        kept = tensor(1)
        assert made.read().live == MEBI
        made.stop()
        del kept
