"""`make verify`: what it prints, and what it ends with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import verify_layouts
from distributed import RankError


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Runs no ranks: the function given says what a case comes to."""

    def install(verify: Callable[..., Any]) -> None:
        monkeypatch.setattr(verify_layouts, "verify", verify)
        monkeypatch.setattr(
            verify_layouts, "ranks", lambda size: SimpleNamespace(run=lambda function: [0] * size)
        )

    return install


def report(difference: float, *failures: str) -> Any:
    step = SimpleNamespace(gradients=SimpleNamespace(difference=difference), loss_difference=0.0)
    return SimpleNamespace(steps=[step], failures=list(failures))


def test_one_row_a_case_and_0_where_all_agree(
    found: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    found(lambda folder, **sections: report(3e-7))
    assert verify_layouts.main(["pp4 tied", "pp4 embedding"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.lstrip().startswith("PP4")]
    assert [row[-5:] for row in rows] == [["4", "3e-07", "0e+00", "0.0", "PASS"]] * len(rows)
    assert len(rows) == 2 and "All 2 layouts PASS" in printed


def test_a_difference_and_a_broken_rank_are_named_and_end_with_1(
    found: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(folder: Path, parallel: dict[str, Any], **sections: Any) -> Any:
        if parallel["context_parallel_size"] == 1:
            return report(0.3, "step 1: the gradient of x differs by 3.0e-01")
        raise RankError(1, "ValueError", "Traceback\nValueError: [s, b]")

    found(verify)
    assert verify_layouts.main(["CP2 DP2 EP2 biases", "PP2 DP2 tied"]) == 1
    printed = capsys.readouterr().out
    assert "PP2 DP2 tied: step 1: the gradient of x differs by 3.0e-01" in printed
    assert "CP2 DP2 EP2 biases: ValueError: [s, b]" in printed
    assert "2 of 2 layouts FAIL" in printed


def test_a_name_that_no_case_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_layouts.main(["nonsense"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("No case has nonsense in its name. They are: ") and "; DP2; " in told
