"""Hugging Face's fast tokenizers: what a tokenizer.json says, by their own library (without transformers)."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.errors import InputError
from megatron_moe.config.huggingface_files import end_of_document, read_tokenizer_json, tokenizer_json
from megatron_moe.data.cutting import Cuts, parts
from megatron_moe.data.packed import optional
from megatron_moe.data.tokenizers import as_array
from megatron_moe.data.word_patterns import END_AT_BLANKS

# One thread a process: worker processes are what works at once. The library reads it when it first encodes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_PART_CHARACTERS = 1 << 16
"""An encoding takes 100 bytes and more a token until its ids are taken out."""


class HuggingFaceTokenizer:
    """A tokenizer.json. No special tokens are added; those that a text spells become what they are there, as
    by default in the library."""

    kind = "huggingface"

    def __init__(self, path: str | Path, eod: str | None = None) -> None:
        """Read the file, or the one in the folder `path`.

        Args:
            eod: the token that ends a document; by default what the files beside the tokenizer.json name as
                end of text.

        InputError for what is no tokenizer, and without such a token.
        """
        file = tokenizer_json(path)
        content, description = read_tokenizer_json(path)
        self._tokenizer = _loaded(file, content)
        if description["model"].get("dropout"):
            raise InputError(
                f"{file}: leaves out merges at random (model.dropout), so that a text has no fixed ids; set "
                "it to null there"
            )
        name = end_of_document(path, eod)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        for token in description.get("added_tokens") or []:
            if vocabulary[token["content"]] != token["id"]:
                raise InputError(
                    f"{file}: gives the added token '{token['content']}' the id {token['id']:,}, of which "
                    f"tokenizers makes {vocabulary[token['content']]:,}, as it numbers them without gaps; "
                    "number them so in the file"
                )
        self._file = file
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod = vocabulary[name]
        added = description.get("added_tokens") or []
        self.special = frozenset(vocabulary[token["content"]] for token in added if token.get("special"))
        """Ids of tokens that stand for no text, such as ends of turns."""
        self.sha256 = hashlib.sha256(content + b"\0" + name.encode()).hexdigest()
        self.cuts: Cuts = "behind words" if _ends_words_at_blanks(description) else "nowhere"

    def encode(self, text: str) -> list[int]:
        return [token for part in self._encode_parts(text) for token in part]

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        ids: list[NDArray[np.uint32]] = [np.zeros(0, np.uint32)] * len(texts)
        short = [at for at, text in enumerate(texts) if len(text) <= 2 * _PART_CHARACTERS]
        for at, found in zip(short, self._encode_each([texts[at] for at in short]), strict=True):
            ids[at] = as_array(found)
        for at in {*range(len(texts))}.difference(short):
            ids[at] = np.concatenate([as_array(part) for part in self._encode_parts(texts[at])])
        return ids

    def _encode_parts(self, text: str) -> Iterator[list[int]]:
        for part in parts(text, self.cuts, _PART_CHARACTERS):
            yield from self._encode_each([part])

    def _encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._guarded(self._tokenizer.encode_batch_fast, texts)]

    def _guarded(
        self, encode: Callable[..., Any], texts: Sequence[str], add_special_tokens: bool = False
    ) -> Any:
        try:
            return encode(texts, add_special_tokens=add_special_tokens)
        except BaseException as error:
            # The library raises nothing more special; where Rust gives up, it is not even an Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InputError(f"{self._file}: has no ids for a text: {error}") from None

    def encode_with_places(self, text: str) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """The ids of a text, and for each token [t, 2] its first character in it and the one behind the last;
        some tokenizers leave blanks around a word out of these."""
        encoding = self._guarded(self._tokenizer.encode_batch, [text])[0]
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return as_array(encoding.ids), places

    def encode_whole(self, text: str) -> list[int]:
        """The ids of a text with the special tokens that the file puts around one, as transformers adds
        them."""
        ids: list[int] = self._guarded(self._tokenizer.encode_batch, [text], add_special_tokens=True)[0].ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; ends of documents vanish."""
        text = self._tokenizer.decode(
            [token for token in ids if token != self.eod], skip_special_tokens=False
        )
        return str(text)


def _loaded(file: Path, content: bytes) -> Any:
    library = optional("tokenizers", "huggingface", str(file))
    try:
        tokenizer = library.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more special
        raise InputError(
            f"{file}: not a tokenizer.json that tokenizers {library.__version__} can read: {error}"
        ) from None
    # A tokenizer.json may say to cut texts off, or to fill them up: both are for inference.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _ends_words_at_blanks(description: Mapping[str, Any]) -> bool:
    """Whether words are cut out by expressions that are known to end one before a blank, and nothing else in
    the tokenizer sees further than a word."""
    added = description.get("added_tokens") or []
    return (
        description["model"].get("type") == "BPE"
        and all(part.get("type") == "NFC" for part in _flat(description.get("normalizer"), "normalizers"))
        and not any(token.get("rstrip") or re.search(r"\s", token["content"]) for token in added)
        and _cuts_words([*_flat(description.get("pre_tokenizer"), "pretokenizers")])
    )


def _cuts_words(steps: Sequence[Mapping[str, Any]]) -> bool:
    patterns = 0
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space", True):
            patterns += bool(step.get("use_regex", True))
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            if (step.get("pattern") or {}).get("Regex") not in END_AT_BLANKS:
                return False
            patterns += 1
        elif kind != "Digits":
            return False
    return patterns > 0


def _flat(part: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer that may be a sequence of others."""
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [part]
    return [step for inner in part.get(inside) or [] for step in _flat(inner, inside)]
