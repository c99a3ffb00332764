"""What an experiment reads, ready before any rank starts: token files that were checked, or made here from
raw text, once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Data, Experiment, Prepare
from megatron_moe.config.schema import Tokenizer as TokenizerSection
from megatron_moe.data.documents import SUFFIXES, file_sha256
from megatron_moe.data.existing import check_token_files
from megatron_moe.data.indexed import open_token_files
from megatron_moe.data.manifest import FORMAT_VERSION, Manifest
from megatron_moe.data.parts import check_parts
from megatron_moe.data.preprocess import preprocess
from megatron_moe.data.staging import staging, sync_folder
from megatron_moe.data.tokenizer_training import train_sentencepiece
from megatron_moe.data.tokenizers import Tokenizer, load_tokenizer

_TOKENS = "tokens"
_TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class Prepared:
    """What the data of an experiment comes down to. With data.kind mock there are no files, and perhaps no
    tokenizer."""

    prefix: Path | None
    """Token files, without .bin/.idx."""
    tokenizer: Tokenizer | None
    manifest: Manifest | None
    vocab_size: int
    """Token ids of the model, before padding."""
    index_cache: Path | None
    """Folder for the sample indices that `data.pretraining` builds."""


def prepare(experiment: Experiment, root: Path) -> Prepared:
    """Check or make the token files of a filled experiment. `root`: its logging.root.

    Any number of processes may call this at once: one of them makes what is missing, the others wait for it.
    Text is hashed at each call to find what was made of it; a corpus too large for that belongs into
    data.path.
    InputError, naming the keys, for whatever is wrong with the files, the tokenizer, or their fit with the
    model.
    """
    data = experiment.data
    made_here = root / "_prepared"  # no run can be called that
    if data.kind == "mock":
        return _mock(experiment)
    if data.path is not None:
        tokenizer = _tokenizer_of_path(data, data.path)
        vocab_size = _vocab_size(experiment, tokenizer)
        with _naming("data.path"):
            manifest = check_token_files(Path(data.path), tokenizer, made_here)
        check_parts(experiment, open_token_files(Path(data.path)).lengths())
        return Prepared(Path(data.path), tokenizer, manifest, vocab_size, made_here / "index")
    if data.prepare is None:
        raise InputError("data.path: nothing to read; set it, or data.prepare.input, or data.kind: mock")
    return _from_text(experiment, data.prepare, data.tokenizer, made_here)


def _from_text(experiment: Experiment, section: Prepare, spec: TokenizerSection, made_here: Path) -> Prepared:
    with _naming("data.prepare.input"):
        hashes = [file_sha256(path) for path in section.input]
    folder = made_here / _folder_name(section, spec, hashes)
    if not folder.is_dir():
        _make_once(section, spec, hashes, folder)
    tokenizer = _tokenizer_in(folder, spec)
    with _naming("data.prepare", f"; remove the folder {folder}, and it is made again"):
        manifest = check_token_files(folder / _TOKENS, tokenizer, folder)
    check_parts(experiment, open_token_files(folder / _TOKENS).lengths())
    return Prepared(
        folder / _TOKENS, tokenizer, manifest, _vocab_size(experiment, tokenizer), folder / "index"
    )


def _mock(experiment: Experiment) -> Prepared:
    spec = experiment.data.tokenizer
    has_one = spec.kind == "bytes" or spec.model is not None
    tokenizer = _load(spec.kind, spec.model) if has_one else None
    if tokenizer is not None:
        return Prepared(None, tokenizer, None, _vocab_size(experiment, tokenizer), None)
    if experiment.model.vocab_size is None:
        raise InputError(
            "model.vocab_size: needed with data.kind: mock where there is no tokenizer, for example 32000"
        )
    return Prepared(None, None, None, experiment.model.vocab_size, None)


def _tokenizer_of_path(data: Data, path: str) -> Tokenizer:
    if data.tokenizer.kind == "sentencepiece" and data.tokenizer.model is None:
        raise InputError(
            f"data.tokenizer.model: needed with data.path: the model file that {path} was made with, "
            f"for example {path}.model, or data.tokenizer.kind: bytes"
        )
    return _load(data.tokenizer.kind, data.tokenizer.model)


def _load(kind: str, model: str | Path | None) -> Tokenizer:
    with _naming("data.tokenizer.model"):
        return load_tokenizer(kind, model)


@contextlib.contextmanager
def _naming(key: str, hint: str = "") -> Iterator[None]:
    """Put the key of the YAML in front of each problem, and `hint` behind it."""
    try:
        yield
    except InputError as error:
        raise InputError(*(f"{key}: {problem}{hint}" for problem in error.problems)) from None


def _vocab_size(experiment: Experiment, tokenizer: Tokenizer) -> int:
    vocab_size = experiment.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size: {vocab_size} is smaller than the {tokenizer.vocab_size} ids of "
            f"data.tokenizer; leave it out or set it to {tokenizer.vocab_size}"
        )
    return vocab_size


def _folder_name(section: Prepare, tokenizer: TokenizerSection, hashes: list[str]) -> str:
    """Names the folder by everything that its content depends on."""
    model = None
    if tokenizer.model is not None and tokenizer.kind == "sentencepiece":
        model = _load(tokenizer.kind, tokenizer.model).sha256
    spec = {
        "format": FORMAT_VERSION,
        "inputs": [[_suffix(path), digest] for path, digest in zip(section.input, hashes, strict=True)],
        "json_key": section.json_key,
        "documents": section.documents,
        "append_eod": section.append_eod,
        "tokenizer": [tokenizer.kind, model, None if model else tokenizer.vocab_size],
    }
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]
    first = Path(section.input[0]).name
    corpus = re.sub(r"[^A-Za-z0-9._-]", "_", first.removesuffix(_suffix(first)))
    return f"{corpus or 'corpus'}-{digest}"


def _suffix(path: str) -> str:
    return next((path[-len(suffix) :] for suffix in reversed(SUFFIXES) if path.lower().endswith(suffix)), "")


def _make_once(section: Prepare, spec: TokenizerSection, hashes: list[str], folder: Path) -> None:
    with staging(folder, wait=True) as aside:
        if folder.is_dir():  # another process made it while this one waited
            return
        ready = aside / "ready"
        ready.mkdir()
        if spec.kind == "sentencepiece" and spec.model is None:
            _train(section, spec, ready / _TOKENIZER)
        with _naming("data.prepare"):
            manifest = preprocess(
                section.input,
                ready / _TOKENS,
                _tokenizer_in(ready, spec),
                documents=section.documents,
                json_key=section.json_key,
                append_eod=section.append_eod,
            )
        if [source.sha256 for source in manifest.inputs] != hashes:
            raise InputError("data.prepare.input: a file changed while it was read; start again")
        ready.rename(folder)
        sync_folder(folder.parent)


def _train(section: Prepare, spec: TokenizerSection, output: Path) -> None:
    if spec.vocab_size is None:
        raise InputError(
            "data.tokenizer.vocab_size: needed to train a sentencepiece tokenizer, for example 1024"
        )
    try:
        train_sentencepiece(section.input, spec.vocab_size, output, section.json_key)
    except InputError as error:
        problem = str(error)
        key = "data.tokenizer." if problem.startswith("vocab_size:") else "data.prepare: "
        raise InputError(key + problem) from None


def _tokenizer_in(folder: Path, spec: TokenizerSection) -> Tokenizer:
    return _load(spec.kind, spec.model if spec.model is not None else folder / _TOKENIZER)
