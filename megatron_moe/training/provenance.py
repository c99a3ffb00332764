"""What a checkpoint was trained on, so that a run goes on with the same data only. No torch: the launcher
asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.data.prepare import Prepared

ABOUT = "about.json"


def of(prepared: Prepared) -> dict[str, Any]:
    """Hashes and counts that tell one tokenizer and corpus from another, wherever their files lie."""
    tokenizer, manifest = prepared.tokenizer, prepared.manifest
    data = None
    if manifest is not None:
        data = {
            # Empty where other tools made the token files; then these numbers have to do. The entropy is a
            # function of how often each token occurs.
            "inputs_sha256": [source.sha256 for source in manifest.inputs],
            "tokens": manifest.tokens,
            "documents": manifest.documents,
            "unigram_entropy_nats": manifest.unigram_entropy_nats,
        }
    return {"tokenizer_sha256": None if tokenizer is None else tokenizer.sha256, "data": data}


def check(checkpoint: Path, prepared: Prepared) -> None:
    """Raise InputError where `checkpoint` was trained with another tokenizer or on other data."""
    saved, now = json.loads((checkpoint / ABOUT).read_text()), of(prepared)
    before, after = saved["tokenizer_sha256"], now["tokenizer_sha256"]
    if before != after:
        raise InputError(
            f"data.tokenizer: its sha256 is {_short(after)}, but was {_short(before)} when {checkpoint.name} "
            "was saved; use that tokenizer, or give this run another name"
        )
    if saved["data"] is None or now["data"] is None:
        return
    for key, before in saved["data"].items():
        after = now["data"][key]
        if before != after and not (key == "inputs_sha256" and not (before and after)):
            section = "data.prepare.input" if saved["data"]["inputs_sha256"] else "data.path"
            what = key.replace("_", " ")
            raise InputError(
                f"{section}: other data than {checkpoint.name} was trained on ({what}: {_short(after)}, but "
                f"was {_short(before)}); use that data, or give this run another name"
            )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_short(entry) for entry in value) + "]"
    return value[:12] if isinstance(value, str) else "none" if value is None else f"{value:,}"
