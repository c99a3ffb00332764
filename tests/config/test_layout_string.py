"""Layout strings against Megatron-Core's own parser, and every mistake in one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from experiment_files import DENSE, loaded, problems
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.layout_string import LayoutMistake, layers_of, mtp_of

KEY = "pipeline.layers_per_stage"
PP, VPP = (f"parallel.{name}_parallel_size" for name in ("pipeline_model", "virtual_pipeline_model"))

_ONE = st.one_of(
    st.sampled_from(["t", "|", ",", "tt|"]),
    st.builds("t*{}".format, st.integers(0, 12)),
    st.builds("|*{}".format, st.integers(1, 2)),
)
_INSIDE = st.lists(_ONE, min_size=1, max_size=4).map("".join).filter(lambda text: text.strip(","))
_GROUP = st.builds("({})*{}".format, _INSIDE, st.integers(0, 30))
_END = st.sampled_from(["", "", "m", "|m", "m*2", "m|", ",m|", "|m*3|"])
WRITTEN = st.builds("E{}{}L".format, st.lists(st.one_of(_ONE, _GROUP), max_size=6).map("".join), _END)
"""What a person may write."""
SCRIBBLED = st.text(alphabet="EtL|()*,12m", max_size=14)
"""What a typing error may leave."""
MEGATRONS_OWN = re.compile(r"\)\*\d+\*|\(\*|\*\)|^\*|\(,+\)|\*,|,\*")
"""Where Megatron-Core's substitutions meet by chance: a repeat of a repeat, one that begins a parenthesis,
one that stands apart from its number."""


def by_megatron(text: str) -> list[int] | None:
    """Layers of each stage as Megatron-Core reads them, None where it refuses the string."""
    # Imported here, so that the other tests of this file run without torch.
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout as Theirs

    try:
        layout = Theirs(text, Theirs.get_num_stages_from_str(text))
        count = layout.flatten_layout.count
        layout.validate_layer_layout(count(LayerType.decoder), count(LayerType.mtp) or None)
    except (AssertionError, IndexError):
        return None
    return [stage[0].count(LayerType.decoder) for stage in layout.layout]


@pytest.mark.second_pair
@given(WRITTEN)
def test_strings_mean_what_they_mean_to_megatron_core(text: str) -> None:
    assert layers_of(text) == by_megatron(text)


@pytest.mark.second_pair
@given(SCRIBBLED)
def test_what_megatron_core_cannot_read_is_refused(text: str) -> None:
    try:
        ours = layers_of(text)
    except LayoutMistake:
        assert by_megatron(text) is None or MEGATRONS_OWN.search(text)
    else:
        assert ours == by_megatron(text)


def test_megatrons_own_example() -> None:
    assert layers_of("Et*3|(tt|)*29,m|L") == [3, *[2] * 29, 0, 0]
    assert mtp_of("Et*3|(tt|)*29,m|L") == (1, 30)


def test_a_string_becomes_a_list_and_says_the_virtual_stages(tmp_path: Path) -> None:
    text = DENSE + 'parallel: {pipeline_model_parallel_size: 2}\npipeline: {layers_per_stage: "Et|t|tt|L"}\n'
    found = loaded(tmp_path, text)
    assert found.experiment.pipeline.layers_per_stage == [1, 1, 2, 0]
    assert found.experiment.parallel.virtual_pipeline_model_parallel_size == 2
    assert str(found.provenance[KEY]).endswith("experiment.yaml:6")
    assert str(found.provenance[VPP]) == "derived"
    (line,) = problems(tmp_path, text, [f"{VPP}=1"])
    assert line.startswith(f'experiment.yaml:6: {KEY}: "Et|t|tt|L" makes the number of stages 4 and not 2')
    (line,) = problems(tmp_path, text, [f"{PP}=1"])
    assert line.startswith(f'experiment.yaml:6: {KEY}: "Et|t|tt|L" makes the number of stages 4 and not 1')
    assert line.endswith(f"or set {PP} to 4")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Et|x|tL", 'has "x", which is no kind of layer'),
        ("Et3|tL", "use t*3 for repeats"),
        ("Etm|tttL", "has m in stage 1, before a layer"),
        ("Ettt|tmmL", "has 2 m, and not one for each of model.mtp_num_layers (0, default); leave m out"),
        ("Ett|ttm|mL", "has m in stages 2 and 3; put all multi-token prediction into one stage"),
        ("tt|ttL", "has no E; write one E, the embedding, first of all"),
        ("EtEt|ttL", "has 2 E"),
        ("t|Ettt|L", "has E in stage 2, where it is not first"),
        ("Ett|tt", "has no L; write one L, the loss, last of all"),
        ("EtL|ttt", "has L in stage 1, where it is not last"),
        ("Ett|ttLt", "has L in stage 2, where it is not last"),
        ("Ett|t(tL", "has unbalanced parentheses at '(tL'"),
        ("Ett|tt)L", "has unbalanced parentheses at ')L'"),
        ("E((t|)*2)*2L", "has parentheses inside parentheses"),
        ("E(tt)|ttL", "repeats nothing with (tt)"),
        ("Ett|t*L", "has a * at '*L'"),
        ("E|t*99999999999999999999|L", "has more than 100,000 layers and stages"),
        ("Ett|t|tL", "makes the number of stages 3 and not 2"),
        ("Ett|tL", "adds up to 3 layers and not to model.num_layers (4, experiment.yaml:2)"),
        ("Ett||tt|L", "leaves stage 2 without a layer, embedding or loss"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, words: str) -> None:
    (line,) = problems(tmp_path, DENSE, [f"{PP}=2", f'{KEY}="{text}"'])
    assert line.startswith(f"override {KEY}: ") and words in line
    assert text in line


def test_a_string_says_where_multi_token_prediction_stands(tmp_path: Path) -> None:
    depths = ["model.mtp_num_layers=2", f"{PP}=4"]
    found = loaded(tmp_path, DENSE, *depths, f'{KEY}="Ett|tt|mm|L"').experiment.pipeline
    assert (found.layers_per_stage, found.mtp_stage) == ([2, 2, 0, 0], 2)
    assert loaded(tmp_path, DENSE, *depths, f'{KEY}="E|tt|tt|mmL"').experiment.pipeline.mtp_stage == 3
    (line,) = problems(tmp_path, DENSE, [*depths, f'{KEY}="E|tt|tt|L"'])
    assert "has no m, and not one for each of model.mtp_num_layers (2, override); write 2 m" in line
    (line,) = problems(tmp_path, DENSE, [*depths, f'{KEY}="Ett|tt|mm|L"', "pipeline.mtp_stage=3"])
    assert line.startswith(f"override pipeline.mtp_stage: 3 is not 2, where {KEY}")


FIRST, LAST = "pipeline.num_layers_in_first_stage", "pipeline.num_layers_in_last_stage"
TEN = ["model.num_layers=10", f"{PP}=4"]


@pytest.mark.parametrize(
    ("counts", "layers"),
    [
        ([f"{FIRST}=1"], [1, 3, 3, 3]),
        ([f"{LAST}=1"], [3, 3, 3, 1]),
        ([f"{FIRST}=2", f"{LAST}=0"], [2, 4, 4, 0]),
        ([f"{FIRST}=4", f"{LAST}=6", f"{PP}=2"], [4, 6]),
        ([f"{FIRST}=1", f"{LAST}=3", f"{PP}=2", f"{VPP}=2"], [1, 3, 3, 3]),
        ([f"{FIRST}=10", f"{PP}=1"], [10]),
        ([f"{FIRST}=1", f"{KEY}=[1, 2, 2, 5]"], [1, 2, 2, 5]),
    ],
)
def test_counts_of_the_first_and_last_stage(tmp_path: Path, counts: list[str], layers: list[int]) -> None:
    assert loaded(tmp_path, DENSE, *TEN, *counts).experiment.pipeline.layers_per_stage == layers


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (
            [f"{FIRST}=2"],
            f"{FIRST}: 2 leaves 8 of model.num_layers (10, override), which do not divide over",
        ),
        (
            [f"{FIRST}=2", f"{LAST}=3"],
            f"{FIRST}: 2 plus {LAST} (3, override) leaves 5 of model.num_layers (10, override), which do not "
            "divide over 2 other stages; change them",
        ),
        ([f"{LAST}=11"], f"{LAST}: 11 is more than model.num_layers (10, override)"),
        ([f"{FIRST}=4", f"{LAST}=4", f"{PP}=2"], "is 8, and not model.num_layers (10, override)"),
    ],
)
def test_counts_that_leave_no_even_rest(tmp_path: Path, counts: list[str], words: str) -> None:
    (line,) = problems(tmp_path, DENSE, [*TEN, *counts])
    assert words in line
