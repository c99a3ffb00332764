"""Records as token files: ids and index in Megatron's format, and beside them which tokens are targets and
where each record comes from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_moe.config.errors import InputError
from megatron_moe.data.encode import FIRST_NAMED
from megatron_moe.data.indexed import TokenWriter, bin_path, open_token_files
from megatron_moe.data.instruction.encode import EncodedRecords
from megatron_moe.data.instruction.record_files import place
from megatron_moe.data.manifest import Source
from megatron_moe.data.preprocess import entropy_nats

FORMAT_VERSION = 1
_NAME, _TARGETS, _ORIGINS, _MANIFEST = "tokens", "targets.bin", "origins.bin", "records.json"


class RecordsManifest(BaseModel):
    """What token files of records hold and where they come from."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: int = FORMAT_VERSION
    tokenizer_sha256: str
    chat_form: str
    records: int
    skipped_records: int
    tokens: int
    targets: int
    """Tokens that are learned; the first of a record never is, as nothing stands before it."""
    target_entropy_nats: float
    """Entropy of the targets' distribution, -sum p ln p, in nats: the loss of the best guess without
    context."""
    content_sha256: str
    """Of all ids, lengths and targets."""
    inputs: list[Source]


@dataclass(frozen=True)
class TokenRecords:
    """Token files of records that were found whole."""

    folder: Path
    manifest: RecordsManifest
    tokens: NDArray[Any]
    """[t] ids of all records, one after the other, mapped and not read."""
    targets: NDArray[np.bool_]
    """[t] whether a token is one, mapped and not read."""
    begins: NDArray[np.int64]
    """[records + 1] first token of each record."""

    def lengths(self) -> NDArray[np.int64]:
        """[records] tokens of each."""
        return np.diff(self.begins)

    def place(self, record: int) -> str:
        """Where a record comes from."""
        file, number = np.fromfile(self.folder / _ORIGINS, np.int64, 2, offset=16 * record).tolist()
        return place(self.manifest.inputs[file].path, number)


def write_records(
    folder: Path,
    vocab_size: int,
    dtype: type[np.integer[Any]],
    parts: Iterator[tuple[int, EncodedRecords]],
    inputs: list[Source],
    tokenizer_sha256: str,
    chat_form: str,
) -> tuple[RecordsManifest, list[str]]:
    """Write the files into `folder`; returns what they hold, and what is wrong with the first records that
    were left out.

    Args:
        parts: the number of the input and what is in a chunk of it, in order. InputError where nothing is.
        inputs: complete once `parts` ends.
    """
    counts = np.zeros(vocab_size, np.int64)
    digests = [hashlib.sha256() for _ in range(3)]
    bad_records, first_bad = 0, list[str]()
    writer = TokenWriter(folder / _NAME, dtype)
    with (folder / _TARGETS).open("wb") as targets, (folder / _ORIGINS).open("wb") as origins:
        try:
            for file, part in parts:
                writer.add(part.tokens, part.lengths, ends_document=True)
                learned = part.targets.copy()
                learned[np.cumsum(part.lengths) - part.lengths] = False
                targets.write(learned.tobytes())
                origins.write(np.stack([np.full_like(part.numbers, file), part.numbers], 1).tobytes())
                for digest, array in zip(digests, (part.tokens, learned, part.lengths), strict=True):
                    digest.update(array.tobytes())
                counts += np.bincount(part.tokens[learned], minlength=vocab_size)
                bad_records += part.bad_records
                first_bad += part.first_bad[: FIRST_NAMED - len(first_bad)]
            records, tokens = writer.finish()
        finally:
            writer.close()
        if not records:
            raise InputError(_nothing(inputs, bad_records, first_bad))
        for stream in (targets, origins):
            _to_disk(stream)
    manifest = RecordsManifest(
        tokenizer_sha256=tokenizer_sha256,
        chat_form=chat_form,
        records=records,
        skipped_records=bad_records,
        tokens=tokens,
        targets=int(counts.sum()),
        target_entropy_nats=entropy_nats(counts),
        content_sha256=hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest(),
        inputs=inputs,
    )
    with (folder / _MANIFEST).open("wb") as stream:
        stream.write(manifest.model_dump_json(indent=2).encode() + b"\n")
        _to_disk(stream)
    return manifest, first_bad


def open_records(folder: Path) -> TokenRecords:
    """The files in `folder`. InputError for damaged ones."""
    try:
        manifest = RecordsManifest.model_validate_json((folder / _MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{folder / _MANIFEST}: does not describe token files of records: {error}") from None
    files = open_token_files(folder / _NAME)
    sizes = {_TARGETS: manifest.tokens, _ORIGINS: 16 * manifest.records}
    for name, expected in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected:
            raise InputError(f"{path}: is not the {expected:,} bytes that belong to {folder / _MANIFEST}")
    if (files.tokens, files.documents) != (manifest.tokens, manifest.records):
        raise InputError(f"{bin_path(folder / _NAME)}: does not belong to {folder / _MANIFEST}")
    lengths = files.lengths()
    begins = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    targets = np.memmap(folder / _TARGETS, np.bool_, "r", shape=(manifest.tokens,))
    return TokenRecords(folder, manifest, files.read(), targets, begins)


def _nothing(inputs: Sequence[Source], bad_records: int, first_bad: Sequence[str]) -> str:
    paths = [source.path for source in inputs]
    shown = ", ".join(paths[:FIRST_NAMED]) + (" and others" if len(paths) > FIRST_NAMED else "")
    why = "no records"
    if bad_records:
        why = f"all {bad_records:,} records were skipped, the first because of {first_bad[0]}"
    return f"{shown}: {why}; give files that hold conversations with answers"


def _to_disk(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
