"""Records of an experiment as token files under the run root, made once: before any rank starts."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment, Instruction
from megatron_moe.config.text_files import expand
from megatron_moe.data.documents import Chunk
from megatron_moe.data.indexed import token_dtype
from megatron_moe.data.instruction.chat import Chat, open_chat
from megatron_moe.data.instruction.encode import EncodedRecords, RecordEncoder, encode_records
from megatron_moe.data.instruction.record_files import open_records as open_file
from megatron_moe.data.instruction.selection import select
from megatron_moe.data.instruction.token_records import (
    FORMAT_VERSION,
    TokenRecords,
    open_records,
    write_records,
)
from megatron_moe.data.made_here import corpus_name, input_hashes, made_once, named, naming
from megatron_moe.data.manifest import Source
from megatron_moe.data.preprocess import tell_skipped
from megatron_moe.data.progress import reading_progress
from megatron_moe.data.tokenizers import Tokenizer
from megatron_moe.data.workers import default_workers, in_order

_KEY = "data.instruction"


@dataclass(frozen=True)
class PreparedInstruction:
    """The records that an experiment reads, as token files."""

    train: TokenRecords
    validation: TokenRecords
    """Those of files of their own, or the same as `train`, of which data.split gives a part."""


def prepare_instruction(experiment: Experiment, tokenizer: Tokenizer, made_here: Path) -> PreparedInstruction:
    """Make the token files of the records if they are not there, and check that enough fits.

    Any number of processes may call this at once: one of them makes what is missing, the others wait for it.

    InputError, naming the keys, for files, records and templates that cannot be used.
    """
    section = experiment.data.instruction
    assert section is not None
    with naming(f"{_KEY}.chat_template" if section.chat_template else "data.tokenizer.model"):
        chat = open_chat(tokenizer, experiment.data.tokenizer.model, section.chat_template)
    train = _prepare(section, section.train, f"{_KEY}.train", tokenizer, chat, made_here)
    validation = train
    if section.validation is not None and experiment.training.eval_interval is not None:
        validation = _prepare(section, section.validation, f"{_KEY}.validation", tokenizer, chat, made_here)
    select(experiment, "training", train)
    if experiment.training.eval_interval is not None:
        select(experiment, "validation", validation)
    return PreparedInstruction(train, validation)


def _prepare(
    section: Instruction, inputs: Sequence[str], key: str, tokenizer: Tokenizer, chat: Chat, made_here: Path
) -> TokenRecords:
    with naming(key):
        files = expand(inputs)
    hashes = input_hashes(files, key, made_here)
    keys = [section.messages_key, section.prompt_key, section.input_key, section.answer_key]
    made_of = {
        "format": FORMAT_VERSION,
        "inputs": hashes,
        "keys": keys,
        "answers": section.answers,
        "bad_records": section.bad_records,
        "chat": chat.sha256,
        "tokenizer": [tokenizer.kind, tokenizer.sha256],
    }
    folder = made_here / named(corpus_name(inputs[0]), made_of)
    with made_once(folder) as ready:
        if ready is not None:
            with naming(key):
                sources = _make(section, files, ready, tokenizer, chat)
            if [source.sha256 for source in sources] != [digest for _, digest in hashes]:
                raise InputError(f"{key}: a file changed while it was read; start again")
    with naming(key, f"; remove the folder {folder}, and it is made again"):
        return open_records(folder)


def _make(
    section: Instruction, files: Sequence[str], folder: Path, tokenizer: Tokenizer, chat: Chat
) -> list[Source]:
    total_bytes = 0
    for path in files:
        open_file(path, section).close()
        total_bytes += os.path.getsize(path)
    dtype = token_dtype(tokenizer.vocab_size)
    work = functools.partial(_numbered, RecordEncoder(chat, section, dtype))
    sources: list[Source] = []
    with reading_progress("tokenized", total_bytes) as show:

        def chunks() -> Iterator[tuple[int, Chunk]]:
            before = 0
            for number, path in enumerate(files):
                with contextlib.closing(open_file(path, section)) as file:
                    for chunk in file.chunks("line", "nowhere"):
                        yield number, chunk
                        show(before + file.bytes_read)
                    before += file.bytes_read
                    name = os.fsencode(path).decode(errors="backslashreplace")  # names may be no UTF-8
                    sources.append(Source(path=name, sha256=file.sha256))

        parts = in_order(work, chunks(), default_workers(total_bytes))
        manifest, first_bad = write_records(
            folder, tokenizer.vocab_size, dtype, parts, sources, tokenizer.sha256, chat.form
        )
    tell_skipped(manifest.skipped_records, first_bad)
    return sources


def _numbered(encoder: RecordEncoder, given: tuple[int, Chunk]) -> tuple[int, EncodedRecords]:
    return given[0], encode_records(encoder, given[1])
