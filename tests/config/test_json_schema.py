"""The schema for editors is the one that the loader follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_moe.config.json_schema import json_schema, json_schema_text
from megatron_moe.config.keys import NAME, known_keys

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_file_is_in_step() -> None:
    """Otherwise: python -m megatron_moe.config.json_schema > configs/schema.json"""
    assert (CONFIGS / "schema.json").read_text(encoding="utf-8") == json_schema_text()


def test_every_key_is_there_and_described() -> None:
    schema = json.loads(json_schema_text())
    for key in known_keys():
        node: dict[str, Any] = schema
        *way, name = key.split(".")
        for part in way:
            node = resolve(schema, child(node, part), name)
        found = child(node, name)
        assert "description" in found or "description" in resolve(schema, found) or key == "name", key
    assert "extends" in schema["properties"]


def child(node: dict[str, Any], name: str) -> dict[str, Any]:
    """The key's own node; sections that the user names are all of one form."""
    if name == NAME:
        mapping = next(option for option in node["anyOf"] if "patternProperties" in option)
        (one,) = mapping["patternProperties"].values()
        return one  # type: ignore[no-any-return]
    found: dict[str, Any] = node["properties"][name]
    return found


def resolve(schema: dict[str, Any], node: dict[str, Any], holding: str = "") -> dict[str, Any]:
    """The definition behind a reference, also behind `X or null`; of several the one that has this key."""
    definitions: list[dict[str, Any]] = [
        schema["$defs"][option["$ref"].rpartition("/")[2]]
        for option in (node, *node.get("anyOf", ()))
        if "$ref" in option
    ]
    holders = [definition for definition in definitions if holding in definition["properties"]]
    return (holders or definitions or [node])[0]


def test_a_file_that_extends_another_may_leave_anything_out() -> None:
    schema = json_schema()
    assert "required" not in schema
    assert schema["additionalProperties"] is False
