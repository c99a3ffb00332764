"""What an experiment reads, ready before any rank starts: token files that were checked, or made here from
raw text, once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Data, Experiment, Source
from megatron_moe.config.sources import key_of, sources_of, texts_of
from megatron_moe.data.existing import check_token_files
from megatron_moe.data.from_text import is_trained_here, load, prepare_text, prepare_tokenizer
from megatron_moe.data.indexed import open_token_files
from megatron_moe.data.instruction.prepare import PreparedInstruction, prepare_instruction
from megatron_moe.data.made_here import naming
from megatron_moe.data.manifest import Manifest
from megatron_moe.data.parts import check_parts
from megatron_moe.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class PreparedSource:
    """Token files that were found in order."""

    name: str
    """In the blend; "" where the data is not blended."""
    prefix: Path
    """Token files, without .bin/.idx."""
    manifest: Manifest
    index_cache: Path
    """Folder for the sample indices that `data.pretraining` builds."""


@dataclass(frozen=True)
class Prepared:
    """What the data of an experiment comes down to. With data.kind mock there are no files, and perhaps no
    tokenizer."""

    sources: tuple[PreparedSource, ...]
    """In the order of their names."""
    tokenizer: Tokenizer | None
    vocab_size: int
    """Token ids of the model, before padding."""
    instruction: PreparedInstruction | None = None
    """The records, with data.kind instruction; there are no sources then."""

    @property
    def reads_files(self) -> bool:
        """Whether there is an end to the data, which is then gone through anew."""
        return bool(self.sources) or self.instruction is not None


def prepare(experiment: Experiment, root: Path) -> Prepared:
    """Check or make the token files of a filled experiment. `root`: its logging.root.

    Any number of processes may call this at once: one of them makes what is missing, the others wait for it.
    Text is hashed at each call to find what was made of it; a corpus too large for that belongs into
    data.path.
    InputError, naming the keys, for whatever is wrong with the files, the tokenizer, or their fit with the
    model; with several sources for all of them.
    """
    data = experiment.data
    made_here = root / "_prepared"  # no run can be called that
    if data.kind == "mock":
        return _mock(experiment)
    if data.kind == "instruction":
        tokenizer = load(data.tokenizer)
        vocab_size = _vocab_size(experiment, tokenizer)
        return Prepared((), tokenizer, vocab_size, prepare_instruction(experiment, tokenizer, made_here))
    sources = sources_of(data)
    tokenizer = _tokenizer(data, sources, made_here)
    vocab_size = _vocab_size(experiment, tokenizer)
    prepared: list[PreparedSource] = []
    problems: list[str] = []
    for name, source in sources.items():
        try:
            prepared.append(_prepare_source(name, source, data, tokenizer, made_here))
            check_parts(experiment, name, open_token_files(prepared[-1].prefix).lengths())
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    return Prepared(tuple(prepared), tokenizer, vocab_size)


def _prepare_source(
    name: str, source: Source, data: Data, tokenizer: Tokenizer, made_here: Path
) -> PreparedSource:
    key = key_of(name)
    if source.prepare is not None:
        made = prepare_text(source.prepare, tokenizer, made_here, f"{key}.prepare")
        return PreparedSource(name, made.prefix, made.manifest, made.folder / "index")
    assert source.path is not None
    with naming(f"{key}.path"):
        manifest = check_token_files(Path(source.path), tokenizer, made_here)
        _check_ends(data, Path(source.path), manifest, tokenizer.eod)
    return PreparedSource(name, Path(source.path), manifest, made_here / "index")


def _check_ends(data: Data, prefix: Path, manifest: Manifest, eod: int) -> None:
    """InputError where an option goes by the ends of documents and there are none."""
    for option in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
        if getattr(data, option) and manifest.append_eod is False:
            raise InputError(
                f"{prefix} has no ends of documents (the id {eod}), which data.{option} goes by; set that to "
                "false, or make the files again with append_eod"
            )


def _mock(experiment: Experiment) -> Prepared:
    spec = experiment.data.tokenizer
    has_one = spec.kind == "bytes" or spec.model is not None
    tokenizer = load(spec) if has_one else None
    if tokenizer is not None:
        return Prepared((), tokenizer, _vocab_size(experiment, tokenizer))
    if experiment.model.vocab_size is None:
        raise InputError(
            "model.vocab_size: needed with data.kind: mock where there is no tokenizer, for example 32000"
        )
    return Prepared((), None, experiment.model.vocab_size)


def _tokenizer(data: Data, sources: dict[str, Source], made_here: Path) -> Tokenizer:
    for name, source in sources.items():
        if source.path is None and source.prepare is None:
            key = key_of(name)
            raise InputError(
                f"{key}.path: nothing to read; set it, or {key}.prepare.input, or data.kind: mock"
            )
    files = {key_of(name): source.path for name, source in sources.items() if source.path is not None}
    if files and is_trained_here(data.tokenizer):
        key, path = next(iter(files.items()))
        raise InputError(
            f"data.tokenizer.model: needed with {key}.path: the model file that {path} was made with, "
            f"for example {path}.model, or data.tokenizer.kind: bytes"
        )
    return prepare_tokenizer(data.tokenizer, texts_of(data), made_here)


def _vocab_size(experiment: Experiment, tokenizer: Tokenizer) -> int:
    vocab_size = experiment.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size: {vocab_size} is smaller than the {tokenizer.vocab_size} ids of "
            f"data.tokenizer; leave it out or set it to {tokenizer.vocab_size}"
        )
    return vocab_size
