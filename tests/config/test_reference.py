"""`docs/reference/config.md` is the schema, in a form to read."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_moe.config.keys import NAME, known_keys, named_section_in, section_in, unions
from megatron_moe.config.reference import reference_text

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "config.md"


def tables() -> dict[str, dict[str, list[str]]]:
    """Heading -> key -> the other cells of its row."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in reference_text().splitlines():
        if line.startswith("##"):
            rows = found.setdefault(line.lstrip("# ").strip("`"), {})
        elif line.startswith("| `"):
            key, *cells = re.split(r"(?<!\\) \| ", line.strip("| "))
            rows[key.strip("`")] = cells
    return found


def test_the_page_is_in_step() -> None:
    """Otherwise: python -m megatron_moe.config.reference > docs/reference/config.md"""
    assert PAGE.read_text(encoding="utf-8") == reference_text()


def test_every_key_stands_in_the_table_of_its_section() -> None:
    found = tables()
    for key, annotation in known_keys().items():
        section, _, name = key.rpartition(".")
        if section in unions():
            kinds = [
                rows for heading, rows in found.items() if heading.startswith("moe.moe_aux_loss_coeff, with")
            ]
            assert len(kinds) == 2 and any(name in rows for rows in kinds), key
        elif section == "" and section_in(annotation) is not None:
            assert key in found, "a section"
        elif name != NAME:
            # The same kind of section in another place: data.blend.<name>.prepare is data.prepare.
            assert name in found.get(section or "At the top", found.get(section.rpartition(".")[2], {})) or (
                section == f"data.blend.{NAME}.prepare" and name in found["data.prepare"]
            ), key


def test_every_row_says_what_the_key_is_and_what_it_is_without_it() -> None:
    for heading, rows in tables().items():
        for key, (kind, default, text) in rows.items():
            assert kind and default, f"{heading}.{key}"
            assert text.endswith("."), f"{heading}.{key}: {text}"
            assert "Default:" not in text, f"{heading}.{key}"


def test_types_and_defaults_in_the_words_of_yaml() -> None:
    found = tables()
    assert found["model"]["num_attention_heads"][:2] == ["integer ≥ 1, ≤ 1000000000", "**required**"]
    assert found["model"]["mtp_num_layers"][:2] == ["integer ≥ 0", "`0`"]
    assert found["model"]["kv_channels"][1] == "hidden_size / num_attention_heads"
    assert found["optimizer"]["adam_beta1"][:2] == ["number ≥ 0, < 1", "`0.9`"]
    assert found["training"]["precision"][:2] == ["`auto`, `fp32`, `bf16`", "`auto`"]
    assert found["training"]["rampup_batch_size"][0] == "list of integer ≥ 1 (3 entries)"
    assert found["moe"]["moe_layer_freq"][0] == "integer ≥ 1, or list of 0 or 1"
    assert found["data.prepare"]["input"][0] == "list of path"
    adaptive, scheduled = (
        f"section [moe.moe_aux_loss_coeff, with {first}](#moemoe_aux_loss_coeff-with-{first})"
        for first in ("initial", "start")
    )
    assert found["moe"]["moe_z_loss_coeff"][0] == f"number ≥ 0, or {adaptive}, or {scheduled}"
    assert found["moe"]["moe_aux_loss_coeff"][0].endswith(f"{scheduled}, or list of these")
    assert found["moe"]["moe_router_load_balancing_type"][0].endswith("`none`, or list of these")
    assert any(named_section_in(annotation) is not None for annotation in known_keys().values())
    assert found["data"]["blend"][0] == f"sections [`data.blend.{NAME}`](#datablendname) by name"
