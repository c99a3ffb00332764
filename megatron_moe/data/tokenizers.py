"""Text to token ids and back.

Here raw UTF-8 bytes, and sentencepiece models; `data.huggingface` and `data.tiktoken_ranks` have the others.
No torch, and no library of a tokenizer at import, so that the worker processes of `data.preprocess` start
quickly.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.errors import InputError
from megatron_moe.config.tokenizer_files import BYTES_VOCAB_SIZE, sentencepiece_model
from megatron_moe.data.cutting import Cuts, parts

SPACE = "\u2581"
"""What sentencepiece writes for a space inside its pieces."""

_PART_CHARACTERS = 2000
_PROBE = "a\n b  \n\n\tc \n"


class Tokenizer(Protocol):
    """How text becomes token ids."""

    kind: str
    """As in data.tokenizer.kind."""
    vocab_size: int
    """Ids are below; not each of them has to be a token."""
    eod: int
    """The id that ends a document."""
    sha256: str
    """Of all that decides which ids a text has: token files and checkpoints carry it."""
    cuts: Cuts
    """Where a document may be cut and encoded in parts."""

    def encode(self, text: str) -> list[int]: ...

    def encode_many(self, texts: Sequence[str]) -> Sequence[NDArray[Any]]:
        """The ids of each text, as arrays: what is fastest for many of them."""

    def decode(self, ids: list[int]) -> str: ...


class BytesTokenizer:
    """UTF-8 bytes as they are: ids 0-255, and 256 ends a document."""

    kind = "bytes"
    vocab_size = BYTES_VOCAB_SIZE
    eod = 256
    sha256 = hashlib.sha256(b"megatron_moe: UTF-8 bytes, 256 ends a document").hexdigest()
    cuts: Cuts = "behind newlines"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.uint8]]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; ends of documents vanish, and bytes that are no UTF-8 become U+FFFD."""
        return bytes(token for token in ids if token != self.eod).decode(errors="replace")


class SentencePieceTokenizer:
    """A sentencepiece model, made here or by anybody else, one of whose pieces ends a document."""

    kind = "sentencepiece"

    def __init__(self, path: str | Path, eod: str | None = None) -> None:
        """Read the model file. `eod`: the piece that ends a document, by default its end-of-sentence piece.

        InputError if it cannot be read, is no sentencepiece model or has no such piece.
        """
        model, self._processor = sentencepiece_model(path)
        self.vocab_size = int(self._processor.vocab_size())
        self.eod = self._end_of_document(path, eod)
        # The model alone decides the ids, unless its own end is not the one that is taken.
        own_end = self.eod == self._processor.eos_id()
        self.sha256 = hashlib.sha256(model if own_end else model + b"\0" + str(eod).encode()).hexdigest()
        try:
            self.cuts: Cuts = "behind newlines" if self._keeps_lines_apart() else "nowhere"
        except UnicodeDecodeError:
            raise InputError(f"{path}: a damaged sentencepiece model: a piece is not UTF-8") from None
        # Sentencepiece reads the character that it writes spaces with as a space; its bytes keep it what it
        # is, where the text behind them begins without a space of its own.
        space_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        has_bytes = all(map(self._processor.is_byte, space_bytes))
        self._space_ids = space_bytes if has_bytes and self.cuts == "behind newlines" else []

    def encode(self, text: str) -> list[int]:
        # In parts where that gives the same ids: sentencepiece's time grows faster than a text's length.
        cut = parts(text, self.cuts, _PART_CHARACTERS)
        return [token for part in cut for token in self._encode_part(part)]

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [as_array(self.encode(text)) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; ends of documents vanish."""
        return str(self._processor.decode([token for token in ids if token != self.eod]))

    def _encode_part(self, text: str) -> list[int]:
        if not self._space_ids or SPACE not in text:
            return list(self._processor.encode(text))
        first, *others = text.split(SPACE)
        ids = list(self._processor.encode(first))
        for other in others:
            ids += self._space_ids + self._processor.encode(other)
        return ids

    def _end_of_document(self, path: str | Path, eod: str | None) -> int:
        model = self._processor
        if eod is not None:
            piece = int(model.piece_to_id(eod))
            if model.id_to_piece(piece) != eod:
                raise InputError(f"eod: {path} has no piece '{eod}'; leave it out to take its own end")
            return piece
        if model.eos_id() < 0:
            raise InputError(
                f"eod: {path} has no end-of-sentence piece to end documents with; name one of its pieces, or "
                "take a model that was trained with an eos_id"
            )
        return int(model.eos_id())

    def _keeps_lines_apart(self) -> bool:
        """Whether nothing in the model reaches across a newline: BPE, no normalisation, no piece that holds a
        newline."""
        model = self._processor
        pieces = range(model.vocab_size())
        # The scores of BPE pieces are their ranks; a unigram model's are log-probabilities, whose sums round.
        is_bpe = all(model.get_score(piece).is_integer() for piece in pieces)
        if not is_bpe or any("\n" in model.id_to_piece(piece) for piece in pieces):
            return False
        whole = model.encode(_PROBE)
        by_line = [token for line in _PROBE.splitlines(keepends=True) for token in model.encode(line)]
        return bool(whole == by_line and model.decode(whole) == _PROBE)


def as_array(ids: list[int]) -> NDArray[np.uint32]:
    """Ids as an array, by way of `array.array`, which takes a tenth of numpy's time."""
    return np.frombuffer(array("I", ids), np.uint32)


def split_lines(text: str) -> list[str]:
    """The lines of `text` with their newlines; the last may be empty. Other than str.splitlines, only a
    newline ends a line."""
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return lines


def load_tokenizer(
    kind: str, model: str | Path | None, eod: str | None = None, pattern: str | None = None
) -> Tokenizer:
    """The tokenizer of `kind`. `model`: its file, or for huggingface also its folder; `eod` and `pattern` as
    in data.tokenizer. InputError if it is missing or wrong, or if a package is missing; one about eod or
    pattern begins with that name."""
    if kind == "bytes":
        return BytesTokenizer()
    if model is None:
        raise InputError(f"a tokenizer of kind {kind} needs its file")
    if kind == "huggingface":
        from megatron_moe.data.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(model, eod)
    if kind == "tiktoken":
        from megatron_moe.data.tiktoken_ranks import TiktokenTokenizer

        return TiktokenTokenizer(model, eod, pattern)
    return SentencePieceTokenizer(model, eod)
