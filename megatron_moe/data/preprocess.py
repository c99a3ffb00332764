"""Text and jsonl files into Megatron's token files, in parallel, whole or not at all.

Workers tokenize chunks of lines; this process reads, keeps the order and writes, so that the result does not
depend on their number. Everything is written into a folder beside the target and moved when it is complete,
the manifest last.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from megatron_moe.config.errors import InputError, not_written, one_line
from megatron_moe.data.cutting import Cuts
from megatron_moe.data.documents import BadRecords, Chunk, Unit
from megatron_moe.data.encode import FIRST_NAMED, Encoded, Encoder, encode_chunk
from megatron_moe.data.indexed import TokenWriter, bin_path, idx_path, token_dtype
from megatron_moe.data.inputs import open_input
from megatron_moe.data.manifest import Manifest, Source, manifest_path, write_manifest
from megatron_moe.data.progress import reading_progress
from megatron_moe.data.staging import staging, sync_folder
from megatron_moe.data.tokenizers import Tokenizer
from megatron_moe.data.workers import default_workers, in_order


def preprocess(
    inputs: Sequence[str],
    prefix: Path,
    tokenizer: Tokenizer,
    *,
    documents: Unit = "file",
    json_key: str = "text",
    append_eod: bool = True,
    bad_records: BadRecords = "error",
    workers: int | None = None,
) -> Manifest:
    """Make `<prefix>.bin`, `.idx` and `.json` from the files `inputs`, replacing what is there.

    `bad_records`: what happens at a document that cannot be read. `workers`: processes that tokenize; by
    default as many as there are cores, fewer for little input.
    InputError, with nothing left behind, for inputs that are missing, empty, damaged or not what their name
    says (file:line), if all records were skipped, and for a target that cannot be written. RunError where the
    disk is full, or a worker was killed.
    """
    total_bytes = sum(_checked_size(path, json_key) for path in inputs)
    encoder = Encoder(tokenizer, token_dtype(tokenizer.vocab_size), json_key, append_eod, bad_records)
    with staging(prefix, wait=False) as folder:
        staged = folder / prefix.name
        with reading_progress("tokenized", total_bytes) as show:
            # A file that may have to be left out as a whole is read as a whole.
            cuts = tokenizer.cuts if bad_records == "error" else "nowhere"
            reader = _Reader(inputs, json_key, documents, cuts, show)
            work = functools.partial(encode_chunk, encoder)
            parts = in_order(work, reader.chunks(), workers or default_workers(total_bytes))
            try:
                manifest = _write(staged, encoder, parts, reader.sources)
                _publish(staged, prefix)
            except OSError as error:
                raise not_written(f"{prefix}: cannot write the token files", error) from None
    return manifest


def entropy_nats(counts: NDArray[np.int64]) -> float:
    """-sum p ln p of the distribution that `counts` [v] stand for, in nats."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


class _Reader:
    """The chunks of all inputs in order; remembers each input's hash."""

    def __init__(
        self, inputs: Sequence[str], json_key: str, unit: Unit, cuts: Cuts, show: Callable[[int], None]
    ) -> None:
        self._inputs = inputs
        self._json_key = json_key
        self._unit = unit
        self._cuts = cuts
        self._show = show
        self.sources: list[Source] = []

    def chunks(self) -> Iterator[Chunk]:
        before = 0
        for path in self._inputs:
            with contextlib.closing(open_input(path, self._json_key)) as file:
                for chunk in file.chunks(self._unit, self._cuts):
                    yield chunk
                    self._show(before + file.bytes_read)
                before += file.bytes_read
                name = os.fsencode(path).decode(errors="backslashreplace")  # names may be no UTF-8
                self.sources.append(Source(path=name, sha256=file.sha256))


def _checked_size(path: str, json_key: str) -> int:
    """Bytes of an input. InputError as `open_input`, for each input before any work is done."""
    open_input(path, json_key).close()
    return os.path.getsize(path)


def _write(prefix: Path, encoder: Encoder, parts: Iterator[Encoded], sources: list[Source]) -> Manifest:
    """Write all three files. `sources` is complete once `parts` ends."""
    tokenizer = encoder.tokenizer
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    empty_documents = text_bytes = bad_records = 0
    first_bad: list[str] = []
    with contextlib.closing(TokenWriter(prefix, encoder.dtype)) as writer:
        for part in parts:
            writer.add(part.tokens, part.lengths, part.ends_document)
            counts += np.bincount(part.tokens, minlength=counts.size)
            empty_documents += part.empty_documents
            text_bytes += part.text_bytes
            bad_records += part.bad_records
            first_bad += part.first_bad[: FIRST_NAMED - len(first_bad)]
        documents, tokens = writer.finish()
    if not tokens:
        paths = [source.path for source in sources]
        shown = ", ".join(paths[:FIRST_NAMED]) + (" and others" if len(paths) > FIRST_NAMED else "")
        why = (
            f"all {bad_records:,} records were skipped, the first because of {first_bad[0]}"
            if bad_records
            else "no documents"
        )
        raise InputError(f"{shown}: {why}; give files that hold text")
    tell_skipped(bad_records, first_bad)
    manifest = Manifest(
        tokenizer_kind=tokenizer.kind,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        documents=documents,
        empty_documents=empty_documents,
        skipped_records=bad_records,
        tokens=tokens,
        text_bytes=text_bytes,
        unigram_entropy_nats=entropy_nats(counts),
        append_eod=encoder.append_eod,
        bin_bytes=bin_path(prefix).stat().st_size,
        idx_bytes=idx_path(prefix).stat().st_size,
        inputs=sources,
    )
    write_manifest(manifest_path(prefix), manifest)
    return manifest


def tell_skipped(count: int, first: Sequence[str]) -> None:
    """Say how many records were left out, and what is wrong with the first ones."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    for problem in first:
        console.print(f"skipped {one_line(problem)}")
    if more := count - len(first):
        console.print(f"skipped {more:,} more bad record{'s' * (more != 1)}, {count:,} in all")


def _publish(staged: Path, prefix: Path) -> None:
    """Move the files to their names. At any moment the manifest there, if any, is that of the files beside
    it."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    manifest_path(prefix).unlink(missing_ok=True)
    idx_path(prefix).unlink(missing_ok=True)
    for path in (bin_path, idx_path, manifest_path):
        path(staged).rename(path(prefix))
    sync_folder(prefix.parent)
