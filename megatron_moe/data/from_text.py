"""Raw text to token files under a run root, once: found again by what they were made of.

One call prepares one source, so that `data.prepare` and each source of a blend are made by the same code.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Prepare
from megatron_moe.config.schema import Tokenizer as TokenizerSection
from megatron_moe.config.text_files import expand
from megatron_moe.data.existing import check_token_files
from megatron_moe.data.made_here import corpus_name, input_hashes, made_once, named, naming
from megatron_moe.data.manifest import FORMAT_VERSION, Manifest
from megatron_moe.data.preprocess import preprocess
from megatron_moe.data.tokenizer_training import Corpus, train_on
from megatron_moe.data.tokenizers import Tokenizer, load_tokenizer

_PACKAGES = {"huggingface": "tokenizers", "tiktoken": "tiktoken"}
_TOKENS = "tokens"
_TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class PreparedText:
    """Token files that were made here."""

    folder: Path
    """Theirs alone; what follows from them, such as sample indices, may be kept there."""
    prefix: Path
    """The token files, without .bin/.idx."""
    manifest: Manifest


def prepare_tokenizer(spec: TokenizerSection, sections: Mapping[str, Prepare], made_here: Path) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, or else one that is trained on the text of all `sections`.

    Args:
        sections: by their dotted key, such as data.prepare or data.blend.web.prepare, which errors name.
        made_here: folder for what is made, `<logging.root>/_prepared`.

    InputError, naming the keys, for a file that is no such tokenizer, and for text that gives none.
    """
    if not is_trained_here(spec):
        return load(spec)
    if spec.vocab_size is None:
        raise InputError(
            "data.tokenizer.vocab_size: needed to train a sentencepiece tokenizer, for example 1024"
        )
    corpora, content = [], []
    for key, section in sections.items():
        files = _files(section, key)
        corpora.append(Corpus(files, section.json_key, section.bad_records))
        content.append(
            [input_hashes(files, f"{key}.input", made_here), section.json_key, section.bad_records]
        )
    made_of = {"format": FORMAT_VERSION, "text": content, "vocab_size": spec.vocab_size}
    folder = made_here / named("tokenizer", made_of)
    with made_once(folder) as ready:
        if ready is not None:
            _train(spec.vocab_size, corpora, " and ".join(sections), ready / _TOKENIZER)
    with naming("data.tokenizer"):
        return load_tokenizer(spec.kind, folder / _TOKENIZER)


def prepare_text(section: Prepare, tokenizer: Tokenizer, made_here: Path, key: str) -> PreparedText:
    """The token files of the text that `section` names, made if they are not there, and checked.

    Any number of processes may call this at once: one of them makes what is missing, the others wait for it.

    Args:
        made_here: folder for what is made, `<logging.root>/_prepared`.
        key: dotted key of `section`, which errors name.
    """
    files = _files(section, key)
    hashes = input_hashes(files, f"{key}.input", made_here)
    options: dict[str, Any] = {
        "json_key": section.json_key,
        "documents": section.documents,
        "append_eod": section.append_eod,
        "bad_records": section.bad_records,
    }
    made_of = {"inputs": hashes, **options, "tokenizer": [tokenizer.kind, tokenizer.sha256]}
    folder = made_here / named(corpus_name(section.input[0]), {"format": FORMAT_VERSION, **made_of})
    with made_once(folder) as ready:
        if ready is not None:
            with naming(key):
                manifest = preprocess(files, ready / _TOKENS, tokenizer, **options)
            if [source.sha256 for source in manifest.inputs] != [digest for _, digest in hashes]:
                raise InputError(f"{key}.input: a file changed while it was read; start again")
    with naming(key, f"; remove the folder {folder}, and it is made again"):
        manifest = check_token_files(folder / _TOKENS, tokenizer, folder)
    return PreparedText(folder, folder / _TOKENS, manifest)


def is_trained_here(spec: TokenizerSection) -> bool:
    """Whether the tokenizer is one to train on the text that is prepared."""
    return spec.kind == "sentencepiece" and spec.model is None


def load(spec: TokenizerSection) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names. InputError, naming the key, if it cannot be used."""
    try:
        return load_tokenizer(spec.kind, spec.model, spec.eod, spec.pattern)
    except InputError as error:
        named = str(error).startswith(("eod: ", "pattern: "))
        raise InputError(f"data.tokenizer.{'' if named else 'model: '}{error}") from None


def check_tokenizer(spec: TokenizerSection) -> None:
    """Load the tokenizer that `data.tokenizer` names, if there is one yet and its package is installed.
    InputError, naming the key, if it cannot be used."""
    package = _PACKAGES.get(spec.kind, "sentencepiece")
    if spec.model is not None and importlib.util.find_spec(package) is not None:
        load(spec)


def _files(section: Prepare, key: str) -> list[str]:
    with naming(f"{key}.input"):
        return expand(section.input)


def _train(vocab_size: int, corpora: Sequence[Corpus], keys: str, output: Path) -> None:
    try:
        train_on(corpora, vocab_size, output)
    except InputError as error:
        problem = str(error)
        raise InputError(
            f"data.tokenizer.{problem}" if problem.startswith("vocab_size:") else f"{keys}: {problem}"
        ) from None
