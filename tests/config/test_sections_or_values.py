"""Keys that take a number or a section of one kind or another, such as coefficients: all that works for other
keys works for theirs, and a mistake is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiment_files import MOE, loaded, problems

from megatron_moe.config.dump import to_yaml
from megatron_moe.config.loading import load
from megatron_moe.config.resume import differences
from megatron_moe.config.schema.moe import AdaptiveCoefficient, ScheduledCoefficient
from megatron_moe.config.yaml_tree import parse

KEY = "moe.moe_aux_loss_coeff"
SCHEDULE = "{start: 0.1, end: 0, iterations: 5}"
LIST = "[0.1, {xi: 0.4}, {start: 0.1, end: 0, iterations: 5}]"
LOSSES = "moe_router_load_balancing_type: [aux_loss, seq_aux_loss, importance_loss]"
TAKES = "must be a number of at least 0, or {initial, xi, maximum, beta}, or {start, end, iterations, style}"


def with_coefficient(value: str | None, *more: str) -> str:
    entries = ["num_moe_experts: 8", *more]
    if value is not None:
        entries.append(f"moe_aux_loss_coeff: {value}")
    return MOE.replace("{num_moe_experts: 8}", f"{{{', '.join(entries)}}}")


@pytest.mark.parametrize(
    ("written", "override", "expected"),
    [
        ("{xi: 0.3}", None, AdaptiveCoefficient(xi=0.3)),
        ("{}", None, AdaptiveCoefficient()),
        (SCHEDULE, None, ScheduledCoefficient(start=0.1, end=0, iterations=5)),
        (None, f"{KEY}.xi=0.3", AdaptiveCoefficient(xi=0.3)),
        ("0.5", f"{KEY}.xi=0.3", AdaptiveCoefficient(xi=0.3)),
        ("{xi: 0.3, beta: 0.5}", f"{KEY}.xi=0.4", AdaptiveCoefficient(xi=0.4, beta=0.5)),
        (SCHEDULE, f"{KEY}.xi=0.3", AdaptiveCoefficient(xi=0.3)),
        (SCHEDULE, f"{KEY}.end=0.05", ScheduledCoefficient(start=0.1, end=0.05, iterations=5)),
        ("{xi: 0.3}", f"{KEY}=0.5", 0.5),
    ],
)
def test_values_and_overrides(
    tmp_path: Path, written: str | None, override: str | None, expected: object
) -> None:
    found = loaded(tmp_path, with_coefficient(written), *([override] if override else []))
    assert found.experiment.moe is not None and found.experiment.moe.moe_aux_loss_coeff == expected


@pytest.mark.parametrize("written", ["0.5", "{xi: 0.3}", SCHEDULE, LIST])
def test_what_is_written_down_reads_back_the_same(tmp_path: Path, written: str) -> None:
    more = [LOSSES] if written == LIST else []
    experiment = loaded(tmp_path, with_coefficient(written, *more)).experiment
    (tmp_path / "resolved.yaml").write_text(to_yaml(experiment))
    assert load(tmp_path / "resolved.yaml").experiment == experiment
    assert differences(parse(to_yaml(experiment), "resolved.yaml").values, experiment) == ([], [])


def test_each_key_says_where_it_came_from(tmp_path: Path) -> None:
    found = loaded(tmp_path, with_coefficient("{xi: 0.3}"), f"{KEY}.beta=0.5")
    origins = {name: str(found.provenance[f"{KEY}.{name}"]) for name in ("xi", "beta", "initial")}
    assert origins == {"xi": f"{tmp_path}/experiment.yaml:5", "beta": "override", "initial": "default"}


def test_a_later_file_replaces_a_coefficient_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(with_coefficient("{xi: 0.3}"))
    text = f"extends: base.yaml\nmoe: {{moe_aux_loss_coeff: {SCHEDULE}}}\n"
    moe = loaded(tmp_path, text).experiment.moe
    assert moe is not None and isinstance(moe.moe_aux_loss_coeff, ScheduledCoefficient)


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        ("high", [f'{KEY}: {TAKES}, or a list of these ("high"); for example 0.01']),
        ("-1.0", [f"{KEY}: {TAKES}, or a list of these (-1.0); for example 0.01"]),
        ('"0.1"', [f'{KEY}: {TAKES}, or a list of these ("0.1"); write 0.1 without quotes']),
        ("{xii: 3}", [f"{KEY}.xii: unknown key; did you mean {KEY}.xi?"]),
        (
            "{xi: -3, beta: 2}",
            [
                f"{KEY}.xi: must be a number above 0 (-3); for example 0.2",
                f"{KEY}.beta: must be a number of at least 0 and below 1 (2); for example 0.99",
            ],
        ),
        (
            "{start: 3}",
            [
                f"{KEY}.end: is missing; give it a number of at least 0",
                f"{KEY}.iterations: is missing; give it a whole number of at least 1",
            ],
        ),
        (
            "{start: 1, end: 0, iterations: 5, xi: 3}",
            [
                f"{KEY}.xi: does not go with start, end, iterations; write "
                "{initial, xi, maximum, beta}, or {start, end, iterations, style}"
            ],
        ),
        (
            "[0.1, {xi: -1}, bad, {xiii: 2}]",
            [
                f"{KEY}[4].xiii: unknown key; did you mean {KEY}.xi?",
                f"{KEY}[2].xi: must be a number above 0 (-1); for example 0.2",
                f'{KEY}: {TAKES}, or a list of these (entry 3 is "bad"); for example 0.01',
            ],
        ),
        ("[[0.1]]", [f"{KEY}: {TAKES}, or a list of these (entry 1 is [0.1]); for example 0.01"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, written: str, lines: list[str]) -> None:
    found = problems(tmp_path, with_coefficient(written))
    assert found == [f"experiment.yaml:5: {line}" for line in lines]


@pytest.mark.parametrize("written", ["[]", "[0.1, 0.2]", "[{xi: 1}]"])
def test_a_list_is_refused_where_one_coefficient_stands(tmp_path: Path, written: str) -> None:
    (line,) = problems(tmp_path, with_coefficient(None, f"moe_z_loss_coeff: {written}"))
    assert line.startswith(f"experiment.yaml:5: moe.moe_z_loss_coeff: {TAKES} (")


def test_right_coefficients_stand_beside_other_mistakes(tmp_path: Path) -> None:
    """Rules still look at them."""
    found = problems(tmp_path, with_coefficient("[0.1, {xi: 0.3}]", "moe_router_topk: 0"))
    assert any("moe.moe_router_topk: must be" in line for line in found)
    assert not any("Traceback" in line for line in found)


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ("0.5", "{xi: 0.3}", (KEY, 0.5, dict(AdaptiveCoefficient(xi=0.3)))),
        ("{xi: 0.3}", "0.5", (KEY, dict(AdaptiveCoefficient(xi=0.3)), 0.5)),
        ("{xi: 0.3}", "{xi: 0.4}", (f"{KEY}.xi", 0.3, 0.4)),
    ],
)
def test_resume_names_the_coefficient_that_changed(
    tmp_path: Path, before: str, after: str, change: tuple[object, ...]
) -> None:
    old, new = (loaded(tmp_path, with_coefficient(text)).experiment for text in (before, after))
    assert differences(old, new) == ([], [change])
