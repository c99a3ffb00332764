"""The all-to-all that runs under computation."""

from __future__ import annotations

import pytest
import torch
from distributed import ranks
from exchange_on_ranks import COUNTS, order_of_events, there_and_back


@pytest.mark.parametrize(
    ("width", "dtype"),
    [((5,), torch.float32), ((), torch.float32), ((5,), torch.bfloat16), ((), torch.int64)],
)
@pytest.mark.second_pair
def test_each_rank_gets_its_rows_and_gradients_go_back(width: tuple[int, ...], dtype: torch.dtype) -> None:
    results = ranks(3).run(there_and_back, width, dtype)
    sent = [result["sent"].split(COUNTS[rank]) for rank, result in enumerate(results)]
    for rank, result in enumerate(results):
        assert torch.equal(result["received"], torch.cat([parts[rank] for parts in sent]))
        if dtype.is_floating_point:
            holders = torch.arange(1, 4).repeat_interleave(torch.tensor(COUNTS[rank]))
            expected = torch.ones_like(result["sent"]) * holders.view(-1, *[1] * len(width))
            assert torch.equal(result["grad"], expected.to(dtype))


def test_a_gradient_travels_while_the_other_part_is_computed() -> None:
    for events in ranks(3).run(order_of_events):
        forward, backward = events[: events.index("backward")], events[events.index("backward") + 1 :]
        assert forward == ["launch 0", "launch 1", "wait 0", "compute a", "wait 1", "compute b"]
        assert backward == [
            "compute b backward",
            "launch 2",
            "compute a backward",
            "launch 3",
            "wait 2",
            "wait 3",
        ]
