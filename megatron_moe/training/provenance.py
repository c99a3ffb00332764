"""What a checkpoint was trained on, so that a run goes on with the same data only. No torch: the launcher
asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.config.sources import key_of
from megatron_moe.data.manifest import Manifest
from megatron_moe.data.prepare import Prepared

ABOUT = "about.json"
_RECORDS = "instruction"


def of(prepared: Prepared) -> dict[str, Any]:
    """Hashes and counts that tell one tokenizer and corpus from another, wherever their files lie."""
    sources = {source.name: _facts(source.manifest) for source in prepared.sources}
    data: dict[str, Any] | None = {"blend": sources} if sources else None
    if "" in sources:  # not blended
        data = sources[""]
    if prepared.instruction is not None:
        records = prepared.instruction.train.manifest
        data = {
            _RECORDS: {
                "inputs_sha256": [file.sha256 for file in records.inputs],
                "records": records.records,
                "content_sha256": records.content_sha256,
            }
        }
    tokenizer = prepared.tokenizer
    return {"tokenizer_sha256": None if tokenizer is None else tokenizer.sha256, "data": data}


def _facts(manifest: Manifest) -> dict[str, Any]:
    return {
        # Empty where other tools made the token files; then these numbers have to do. The entropy is a
        # function of how often each token occurs.
        "inputs_sha256": [file.sha256 for file in manifest.inputs],
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "unigram_entropy_nats": manifest.unigram_entropy_nats,
    }


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
    if _RECORDS in now["data"]:
        return _check_records(checkpoint, saved["data"][_RECORDS], now["data"][_RECORDS])
    sources, given = (about["data"].get("blend", {"": about["data"]}) for about in (saved, now))
    if sources.keys() != given.keys():
        before, after = (", ".join(filter(None, names)) or "no blend" for names in (sources, given))
        raise InputError(
            f"data.blend: other sources than {checkpoint.name} was trained on ({after}, but was {before}); "
            "use these, or give this run another name"
        )
    for name, facts in sources.items():
        _check_source(checkpoint, name, facts, given[name])


def _check_records(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    for key, before in saved.items():
        if before != now[key]:
            cause = "the same files, but another chat template or day" if key == "content_sha256" else "files"
            raise InputError(
                f"data.instruction.train: other records than {checkpoint.name} was trained on ({cause}: "
                f"{key.replace('_', ' ')} {_short(now[key])}, but was {_short(before)}); use those, or give "
                "this run another name"
            )


def _check_source(checkpoint: Path, name: str, saved: dict[str, Any], now: dict[str, Any]) -> None:
    for key, before in saved.items():
        after = now[key]
        if before != after and not (key == "inputs_sha256" and not (before and after)):
            section = f"{key_of(name)}.{'prepare.input' if saved['inputs_sha256'] else 'path'}"
            what = key.replace("_", " ")
            raise InputError(
                f"{section}: other data than {checkpoint.name} was trained on ({what}: {_short(after)}, but "
                f"was {_short(before)}); use that data, or give this run another name"
            )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_short(entry) for entry in value) + "]"
    return value[:12] if isinstance(value, str) else "none" if value is None else f"{value:,}"
