"""Token files that are already there: are they whole, and of the tokenizer and model that want to read
them?"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from megatron_moe.config.errors import InputError
from megatron_moe.data.indexed import TokenFiles, bin_path, idx_path, open_token_files
from megatron_moe.data.manifest import Manifest, manifest_path, read_manifest, write_manifest
from megatron_moe.data.preprocess import entropy_nats
from megatron_moe.data.staging import staging
from megatron_moe.data.tokenizers import Tokenizer

_SCAN_TOKENS = 1 << 24


def check_token_files(prefix: Path, tokenizer: Tokenizer, notes: Path) -> Manifest:
    """What is known about the token files at `prefix`.

    Files without a manifest, as Megatron-LM makes them, are read through once and the result kept under
    `notes`.
    InputError for missing, truncated or contradictory files, for another tokenizer, and for ids beyond its
    vocabulary.
    """
    files = open_token_files(prefix)
    manifest = read_manifest(manifest_path(prefix))
    if manifest is None:
        return _noted_scan(files, tokenizer, notes)
    _compare(files, manifest)
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise InputError(
            f"{prefix} was made with another tokenizer ({manifest.tokenizer_kind}, sha256 "
            f"{str(manifest.tokenizer_sha256)[:12]}) than data.tokenizer says ({tokenizer.kind}, sha256 "
            f"{tokenizer.sha256[:12]}); set data.tokenizer.kind and data.tokenizer.model to the one "
            "it was made with"
        )
    return manifest


def _compare(files: TokenFiles, manifest: Manifest) -> None:
    found = {
        bin_path(files.prefix): (bin_path(files.prefix).stat().st_size, manifest.bin_bytes, "bytes"),
        idx_path(files.prefix): (idx_path(files.prefix).stat().st_size, manifest.idx_bytes, "bytes"),
        files.prefix: (files.tokens, manifest.tokens, "tokens"),
    }
    for path, (has, expected, unit) in found.items():
        if has != expected:
            raise InputError(
                f"{path}: has {has:,} {unit} where {manifest_path(files.prefix).name} says {expected:,}; "
                "it was changed or cut short, make the files anew"
            )


def _noted_scan(files: TokenFiles, tokenizer: Tokenizer, notes: Path) -> Manifest:
    """The manifest that a scan of the files gives; a later call finds it noted for as long as the files stay
    as they are."""
    stats = [path(files.prefix).stat() for path in (bin_path, idx_path)]
    identity = [
        str(files.prefix.resolve()),
        tokenizer.vocab_size,
        tokenizer.eod,
        *((stat.st_size, stat.st_mtime_ns) for stat in stats),
    ]
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:12]
    note = notes / f"checked-{files.prefix.name}-{digest}.json"
    if (noted := read_manifest(note)) is not None:
        return noted
    with staging(note, wait=True) as folder:
        if (noted := read_manifest(note)) is None:
            noted = _scan(files, tokenizer.vocab_size, tokenizer.eod)
            write_manifest(folder / note.name, noted)
            (folder / note.name).rename(note)
    return noted


def _scan(files: TokenFiles, vocab_size: int, eod: int) -> Manifest:
    tokens = files.read()
    counts = np.zeros(vocab_size, np.int64)
    smallest, largest = 0, 0
    for start in range(0, files.tokens, _SCAN_TOKENS):
        part = tokens[start : start + _SCAN_TOKENS]
        smallest, largest = min(smallest, int(part.min())), max(largest, int(part.max()))
        if smallest >= 0 and largest < vocab_size:
            counts += np.bincount(part, minlength=vocab_size)
    if smallest < 0:
        raise InputError(f"{files.prefix} holds the token id {smallest}; make the files anew, ids begin at 0")
    if largest >= vocab_size:
        raise InputError(
            f"{files.prefix} holds the token id {largest}, so that its tokenizer has {largest + 1} ids or "
            f"more, but data.tokenizer has {vocab_size}; set data.tokenizer.kind and data.tokenizer.model to "
            "the one it was made with"
        )
    return Manifest(
        tokenizer_kind=None,
        tokenizer_sha256=None,
        vocab_size=vocab_size,
        documents=files.documents,
        empty_documents=0,
        tokens=files.tokens,
        text_bytes=None,
        unigram_entropy_nats=entropy_nats(counts),
        append_eod=None if counts[eod] else False,
        bin_bytes=bin_path(files.prefix).stat().st_size,
        idx_bytes=idx_path(files.prefix).stat().st_size,
        inputs=[],
    )
