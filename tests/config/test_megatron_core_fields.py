"""`model.megatron_core`: field names and types against the class itself, and what is refused with which
reason."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
from experiment_files import DENSE, MOE, problems

from megatron_moe.config import transformer_fields as reader
from megatron_moe.config.megatron_core_rules import own_key
from megatron_moe.config.refused_fields import NEEDS_TRANSFORMER_ENGINE, NOT_SETTABLE, OTHER_NAMES, refusal

MODEL_ROOM = Path(__file__).parents[2] / "megatron_moe" / "model"


@pytest.mark.second_pair
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_source_is_read_as_python_reads_it() -> None:
    """Names against the imported class, and each default that YAML could hold is accepted by its own
    annotation."""
    from megatron.core.transformer import TransformerConfig

    fields = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    read = reader.transformer_fields()
    assert read.keys() == {name for name in fields if not name.startswith("_")}
    checked = 0
    for name, annotation in read.items():
        default = fields[name].default
        if reader.describe(annotation) is None or default is dataclasses.MISSING:
            continue
        if default is None and "Optional" not in ast.unparse(annotation):
            continue
        checked += 1
        assert reader.accepts(annotation, default), (name, ast.unparse(annotation), default)
    assert checked > 150


@pytest.mark.parametrize(
    ("annotation", "value", "fits"),
    [
        ("int", 3, True),
        ("int", 3.0, False),
        ("int", True, False),
        ("float", 3, True),
        ("float", "3", False),
        ("bool", 1, False),
        ("Optional[str]", None, True),
        ("str | None", None, True),
        ("int | None", "x", False),
        ("Literal['a', 2]", "a", True),
        ("Literal['a', 2]", "b", False),
        ("Union[int, List[int]]", [1, 2], True),
        ("typing.Union[int, list[int]]", [1, "2"], False),
        ("Optional[Tuple[int, int]]", [1, 2], True),
        ("Tuple[int, int]", [1], False),
        ("Callable", 1, False),
        ("torch.dtype", "fp32", False),
    ],
)
def test_types(annotation: str, value: object, fits: bool) -> None:
    assert reader.accepts(ast.parse(annotation, mode="eval").body, value) is fits


@pytest.mark.second_pair
def test_what_the_model_room_sets_cannot_be_set_here_too() -> None:
    """A field given twice would be a TypeError when the model is built."""
    tree = ast.parse((MODEL_ROOM / "transformer_config.py").read_text(encoding="utf-8"))
    makers = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.endswith("_fields")
    ]
    set_there = {
        key.value
        for maker in makers
        for record in ast.walk(maker)
        if isinstance(record, ast.Dict)
        for key in record.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    } | {"virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout"}
    assert len(set_there) > 20
    open_to_all = {
        name
        for name in set_there & reader.transformer_fields().keys()
        if own_key(name) is None and refusal(name, "transformer_engine") is None
    }
    # It is set where model.qk_norm is, beside which a rule refuses it.
    assert open_to_all == {"qk_l2_norm"}


@pytest.mark.second_pair
def test_what_is_left_open_can_be_written_in_yaml() -> None:
    fields = reader.transformer_fields()
    left = [name for name in fields if own_key(name) is None and refusal(name, "native") is None]
    assert {
        "qk_l2_norm",
        "rotary_interleaved",
        "no_rope_freq",
    } <= set(left)
    assert [name for name in left if reader.describe(fields[name]) is None] == []


def test_fields_that_do_not_work_natively_are_refused() -> None:
    for name in (
        "fp8",
        "fp8_recipe",
        "apply_rope_fusion",
        "moe_permute_fusion",
        "moe_router_fusion",
        "moe_latent_size",
        "gradient_accumulation_fusion",
        "enable_cuda_graph",
        "cuda_graph_impl",
        "cpu_offloading",
        "moe_enable_deepep",
        "params_dtype",
        "finalize_model_grads_func",
        "pipeline_dtype",
        "init_method",
        "batch_p2p_comm",
        "window_size",
    ):
        assert own_key(name) or refusal(name, "native"), name
    assert refusal("fp8", "transformer_engine") is None


def test_no_pattern_matches_nothing_by_a_slip() -> None:
    """Each pattern names a field of the installed version, or one that only another supported version has."""
    import re

    only_elsewhere = {r"moe_use_legacy_grouped_gemm|moe_router_force_biased"}
    fields = reader.transformer_fields()
    patterns = {*NOT_SETTABLE, *NEEDS_TRANSFORMER_ENGINE} - only_elsewhere
    assert [p for p in patterns if not any(re.fullmatch(p, name) for name in fields)] == [
        p for p in patterns if "moe_single_grouped" in p and "moe_single_grouped_weight" not in fields
    ]
    assert OTHER_NAMES.keys() <= fields.keys()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("qk_l2_norn=true", "no field of the installed TransformerConfig; did you mean qk_l2_norm?"),
        ("qk_layernorm=true", "is what model.qk_norm decides; set model.qk_norm and leave this out"),
        ("qk_l2_norm=1", "1 must be true or false"),
        ("no_rope_freq=x", "must be a whole number, or a list, each entry a whole number, or null"),
        ("moe_router_score_function=sigmoid", "is what moe.moe_router_score_function"),
        ("moe_router_force_load_balancing=true", 'is what moe.moe_router_gate ("topk", default) decides'),
        ("moe_latent_size=8", "cannot be set: the router and experts here do not compute it"),
        ("hidden_size=3", "is what model.hidden_size (64, experiment.yaml:2) decides"),
        ("bf16=true", 'is what training.precision ("auto", default) decides'),
        ("init_method=x", "cannot be set: the trainer sets it itself"),
        ("bias_dropout_fusion=true", "cannot be set: the trainer sets it itself"),
    ],
)
def test_messages(tmp_path: Path, entry: str, words: str) -> None:
    (line,) = problems(tmp_path, MOE, [f"model.megatron_core.{entry}"])
    assert line.startswith(f"override model.megatron_core.{entry.partition('=')[0]}: ")
    assert words in line


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.qk_layernorm", "did you mean model.qk_norm?"),
        ("model.qk_l2_norm", "did you mean model.megatron_core.qk_l2_norm?"),
        ("moe.moe_router_force_load_balancing", "did you mean moe.moe_router_gate?"),
        ("parallel.batch_p2p_comm", "it is a field of Megatron-Core that cannot be set: the trainer sets it"),
        ("training.bf16", "did you mean training.precision?"),
        ("model.moe_router_topk", "did you mean moe.moe_router_topk?"),
        ("model.num_layer", "did you mean model.num_layers?"),
    ],
)
def test_an_unknown_key_that_megatron_core_knows(tmp_path: Path, key: str, words: str) -> None:
    (line,) = problems(tmp_path, MOE, [f"{key}=1"])
    assert line.startswith(f"override {key}: unknown key; {words}")


@pytest.mark.second_pair
def test_what_routers_and_dispatchers_do_is_said_in_the_section_moe() -> None:
    """They are ours and read no field of Megatron-Core: only experts of Transformer Engine do."""
    names = [name for name in reader.transformer_fields() if name.startswith("moe_")]
    assert len(names) > 30
    native = [name for name in names if own_key(name) is None and refusal(name, "native") is None]
    assert native == []
    engine = [name for name in names if own_key(name) is None and refusal(name, "transformer_engine") is None]
    assert [name for name in engine if "single_grouped" not in name and "glu_interleave" not in name] == []


def test_without_megatron_core_fields_are_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(file: str) -> str:
        raise reader.NotInstalled

    reader.transformer_fields.cache_clear()
    monkeypatch.setattr(reader, "_source", missing)
    try:
        (line,) = problems(tmp_path, DENSE, ["model.megatron_core.qk_l2_norm=true"])
        assert "megatron-core is not installed" in line
        assert problems(tmp_path, DENSE) == []
    finally:
        reader.transformer_fields.cache_clear()
