"""The JSON schema of the YAML file, for editors (`configs/schema.json`)."""

from __future__ import annotations

import json
from typing import Any

from megatron_moe.config.schema import Experiment

_EXTENDS = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "description": "Files that this one builds on, relative to it; later ones win, this one over all.",
    "title": "Extends",
}


def json_schema() -> dict[str, Any]:
    """The schema of one file. It requires no key, because a file that extends another one needs none
    itself."""
    schema = Experiment.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
    schema["properties"] = {"name": schema["properties"]["name"], "extends": _EXTENDS, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def json_schema_text() -> str:
    """What `configs/schema.json` holds: `python -m megatron_moe.config.json_schema > configs/schema.json`."""
    return json.dumps(json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema_text(), end="")
