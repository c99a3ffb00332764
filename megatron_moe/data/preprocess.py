"""Text and jsonl files into Megatron's token files, in parallel, whole or not at all.

Workers tokenize chunks of lines; this process reads, keeps the order and writes, so that the result does not
depend on their number. Everything is written into a folder beside the target and moved when it is complete,
the manifest last.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.errors import InputError
from megatron_moe.data.documents import Chunk, InputFile, Unit
from megatron_moe.data.encode import Encoded, Encoder, encode_chunk, encode_in_worker, start_worker
from megatron_moe.data.indexed import TokenWriter, bin_path, idx_path, token_dtype
from megatron_moe.data.manifest import Manifest, Source, manifest_path, write_manifest
from megatron_moe.data.progress import reading_progress
from megatron_moe.data.staging import staging, sync_folder
from megatron_moe.data.tokenizers import Tokenizer

_BYTES_A_WORKER = 8 << 20
"""Input below this is not worth another process."""


def preprocess(
    inputs: Sequence[str],
    prefix: Path,
    tokenizer: Tokenizer,
    *,
    documents: Unit = "file",
    json_key: str = "text",
    append_eod: bool = True,
    workers: int | None = None,
) -> Manifest:
    """Make `<prefix>.bin`, `.idx` and `.json` from `inputs`, replacing what is there.

    `workers`: processes that tokenize; by default as many as there are cores, fewer for little input.
    InputError, with nothing left behind, for inputs that are missing, empty, damaged or not what their name
    says (file:line), and for a target that cannot be written.
    """
    total_bytes = sum(_checked_size(path) for path in inputs)
    encoder = Encoder(tokenizer, token_dtype(tokenizer.vocab_size), json_key, append_eod)
    with staging(prefix, wait=False) as folder:
        staged = folder / prefix.name
        with reading_progress("tokenized", total_bytes) as show:
            reader = _Reader(inputs, documents, tokenizer.lines_are_independent, show)
            parts = _encoded(encoder, reader.chunks(), workers or _default_workers(total_bytes))
            try:
                manifest = _write(staged, encoder, parts, reader.sources)
                _publish(staged, prefix)
            except OSError as error:
                raise InputError(f"{prefix}: cannot write the token files: {error.strerror}") from None
    return manifest


def entropy_nats(counts: NDArray[np.int64]) -> float:
    """-sum p ln p of the distribution that `counts` [v] stand for, in nats."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


class _Reader:
    """The chunks of all inputs in order; remembers each input's hash."""

    def __init__(
        self, inputs: Sequence[str], unit: Unit, may_split: bool, show: Callable[[int], None]
    ) -> None:
        self._inputs = inputs
        self._unit = unit
        self._may_split = may_split
        self._show = show
        self.sources: list[Source] = []

    def chunks(self) -> Iterator[Chunk]:
        before = 0
        for path in self._inputs:
            with contextlib.closing(InputFile(path)) as file:
                for chunk in file.chunks(self._unit, self._may_split):
                    yield chunk
                    self._show(before + file.bytes_read)
                before += file.bytes_read
                self.sources.append(Source(path=path, sha256=file.sha256))


def _checked_size(path: str) -> int:
    """Bytes of an input. InputError as `InputFile`, for each input before any work is done."""
    InputFile(path).close()
    return os.path.getsize(path)


def _default_workers(total_bytes: int) -> int:
    return max(1, min(len(os.sched_getaffinity(0)), total_bytes // _BYTES_A_WORKER))


def _encoded(encoder: Encoder, chunks: Iterator[Chunk], workers: int) -> Iterator[Encoded]:
    """Each chunk's tokens, in order."""
    if workers == 1:
        yield from (encode_chunk(encoder, chunk) for chunk in chunks)
        return
    # Spawned, because a fork of a process with threads (a progress bar, torch) may hang.
    context = multiprocessing.get_context("spawn")
    pending: deque[Future[Encoded]] = deque()
    with ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(encoder,)) as pool:
        try:
            for chunk in chunks:
                pending.append(pool.submit(encode_in_worker, chunk))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process died, perhaps for want of memory; try fewer workers"
            ) from None
        finally:
            for future in pending:
                future.cancel()


def _write(prefix: Path, encoder: Encoder, parts: Iterator[Encoded], sources: list[Source]) -> Manifest:
    """Write all three files. `sources` is complete once `parts` ends."""
    tokenizer = encoder.tokenizer
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    empty_documents = text_bytes = 0
    with contextlib.closing(TokenWriter(prefix, encoder.dtype)) as writer:
        for part in parts:
            writer.add(part.tokens, part.lengths, part.ends_document)
            counts += np.bincount(part.tokens, minlength=counts.size)
            empty_documents += part.empty_documents
            text_bytes += part.text_bytes
        documents, tokens = writer.finish()
    if not tokens:
        raise InputError(
            f"{', '.join(source.path for source in sources)}: no documents; give files that hold text"
        )
    manifest = Manifest(
        tokenizer_kind=tokenizer.kind,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        documents=documents,
        empty_documents=empty_documents,
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


def _publish(staged: Path, prefix: Path) -> None:
    """Move the files to their names. At any moment the manifest there, if any, is that of the files beside
    it."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    manifest_path(prefix).unlink(missing_ok=True)
    idx_path(prefix).unlink(missing_ok=True)
    for path in (bin_path, idx_path, manifest_path):
        path(staged).rename(path(prefix))
    sync_folder(prefix.parent)
