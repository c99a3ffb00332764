"""What lies beside token files as `<prefix>.json`: where they come from, and what they must look like."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_moe.config.errors import InputError

FORMAT_VERSION = 1


class Source(BaseModel):
    """One input file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    path: str
    """As it was given."""
    sha256: str
    """Of the file's bytes."""


class Manifest(BaseModel):
    """Token files and where they come from. None: unknown, because other tools made the files."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: int = FORMAT_VERSION
    tokenizer_kind: str | None
    tokenizer_sha256: str | None
    vocab_size: int
    """Every id is smaller."""
    documents: int
    empty_documents: int
    """Documents without a token, which were left out."""
    skipped_records: int = 0
    """Records that could not be read, which were left out."""
    tokens: int
    """Ends of documents included."""
    text_bytes: int | None
    """UTF-8 bytes of all documents' text."""
    unigram_entropy_nats: float
    """Entropy of the token distribution, -sum p ln p, in nats a token: the loss of the best guess without
    context."""
    append_eod: bool | None
    bin_bytes: int
    idx_bytes: int
    inputs: list[Source]


def manifest_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest and bring it to the disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(manifest.model_dump_json(indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(path: Path) -> Manifest | None:
    """The manifest, or None if there is none. InputError for one that is damaged or of another version."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the manifest of the token files: {error}") from None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path}: not the manifest of token files ({where + ': ' if where else ''}{first['msg']}); "
            "make the files anew, or remove it if other tools made them"
        ) from None
    if manifest.format_version != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {manifest.format_version}, but this program reads {FORMAT_VERSION}; "
            "make the files anew"
        )
    return manifest
