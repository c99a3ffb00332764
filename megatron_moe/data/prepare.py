"""What an experiment reads, ready before any rank starts: token files that were checked, or made here from
raw text, once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Data, Experiment
from megatron_moe.data.existing import check_token_files
from megatron_moe.data.from_text import is_trained_here, load, naming, prepare_text, prepare_tokenizer
from megatron_moe.data.indexed import open_token_files
from megatron_moe.data.manifest import Manifest
from megatron_moe.data.parts import check_parts
from megatron_moe.data.tokenizers import Tokenizer


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
        with naming("data.path"):
            manifest = check_token_files(Path(data.path), tokenizer, made_here)
        check_parts(experiment, open_token_files(Path(data.path)).lengths())
        return Prepared(Path(data.path), tokenizer, manifest, vocab_size, made_here / "index")
    if data.prepare is None:
        raise InputError("data.path: nothing to read; set it, or data.prepare.input, or data.kind: mock")
    tokenizer = prepare_tokenizer(data.tokenizer, {"data.prepare": data.prepare}, made_here)
    made = prepare_text(data.prepare, tokenizer, made_here, "data.prepare")
    check_parts(experiment, open_token_files(made.prefix).lengths())
    vocab_size = _vocab_size(experiment, tokenizer)
    return Prepared(made.prefix, tokenizer, made.manifest, vocab_size, made.folder / "index")


def _mock(experiment: Experiment) -> Prepared:
    spec = experiment.data.tokenizer
    has_one = spec.kind == "bytes" or spec.model is not None
    tokenizer = load(spec) if has_one else None
    if tokenizer is not None:
        return Prepared(None, tokenizer, None, _vocab_size(experiment, tokenizer), None)
    if experiment.model.vocab_size is None:
        raise InputError(
            "model.vocab_size: needed with data.kind: mock where there is no tokenizer, for example 32000"
        )
    return Prepared(None, None, None, experiment.model.vocab_size, None)


def _tokenizer_of_path(data: Data, path: str) -> Tokenizer:
    if is_trained_here(data.tokenizer):
        raise InputError(
            f"data.tokenizer.model: needed with data.path: the model file that {path} was made with, "
            f"for example {path}.model, or data.tokenizer.kind: bytes"
        )
    return load(data.tokenizer)


def _vocab_size(experiment: Experiment, tokenizer: Tokenizer) -> int:
    vocab_size = experiment.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size: {vocab_size} is smaller than the {tokenizer.vocab_size} ids of "
            f"data.tokenizer; leave it out or set it to {tokenizer.vocab_size}"
        )
    return vocab_size
