"""Text to token ids and back: raw UTF-8 bytes, or a sentencepiece model.

No torch and no sentencepiece at import, so that the worker processes of `data.preprocess` start quickly.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_moe.config.errors import InputError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"
"""What sentencepiece writes for a space inside its pieces."""

_PROBE = "a\n b  \n\n\tc \n"


class Tokenizer(Protocol):
    """How text becomes token ids."""

    kind: str
    """`bytes` or `sentencepiece`."""
    vocab_size: int
    """Ids are 0 .. vocab_size - 1."""
    eod: int
    """The id that ends a document."""
    sha256: str
    """Of the model file's bytes: token files and checkpoints carry it."""
    lines_are_independent: bool
    """encode(a + b) == encode(a) + encode(b) wherever a ends with a newline: a document may be encoded in
    parts."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class BytesTokenizer:
    """UTF-8 bytes as they are: ids 0-255, and 256 ends a document."""

    kind = "bytes"
    vocab_size = 257
    eod = 256
    sha256 = hashlib.sha256(b"megatron_moe: UTF-8 bytes, 256 ends a document").hexdigest()
    lines_are_independent = True

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; ends of documents vanish, and bytes that are no UTF-8 become U+FFFD."""
        return bytes(token for token in ids if token != self.eod).decode(errors="replace")


class SentencePieceTokenizer:
    """A sentencepiece model, made here or by anybody else, whose end-of-sentence piece ends a document."""

    kind = "sentencepiece"

    def __init__(self, path: str | Path) -> None:
        """Read the model file. InputError if it cannot be read, is no sentencepiece model or has no
        end-of-sentence piece."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot read the sentencepiece model: {error.strerror}") from None
        self._processor = _processor(path, model)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = int(self._processor.vocab_size())
        self.eod = int(self._processor.eos_id())
        if self.eod < 0:
            raise InputError(
                f"{path}: this sentencepiece model has no end-of-sentence piece to end documents with; "
                "take one that was trained with an eos_id"
            )
        # Sentencepiece reads the character that it writes spaces with as a space; its bytes keep it what it
        # is.
        space_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_ids = space_bytes if all(map(self._processor.is_byte, space_bytes)) else []
        self.lines_are_independent = self._keeps_lines_apart()

    def encode(self, text: str) -> list[int]:
        # Line by line where that gives the same ids: sentencepiece's time grows faster than a text's length.
        parts = split_lines(text) if self.lines_are_independent else [text]
        return [token for part in parts for token in self._encode_part(part)]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; ends of documents vanish."""
        return str(self._processor.decode(ids))

    def _encode_part(self, text: str) -> list[int]:
        if not self._space_ids or SPACE not in text:
            return list(self._processor.encode(text))
        first, *others = text.split(SPACE)
        ids = list(self._processor.encode(first))
        for other in others:
            ids += self._space_ids + self._processor.encode(other)
        return ids

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


def split_lines(text: str) -> list[str]:
    """The lines of `text` with their newlines; the last may be empty. Other than str.splitlines, only a
    newline ends a line."""
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return lines


def load_tokenizer(kind: str, model: str | Path | None) -> Tokenizer:
    """The tokenizer of `kind`. `model`: the sentencepiece model file. InputError if it is missing or
    wrong."""
    if kind == "bytes":
        return BytesTokenizer()
    if model is None:
        raise InputError("a sentencepiece tokenizer needs its model file")
    return SentencePieceTokenizer(model)


def _processor(path: str | Path, model: bytes) -> SentencePieceProcessor:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        # An empty file parses as a model without pieces, which later calls only complain about on stderr.
        if model and processor.LoadFromSerializedProto(model):
            return processor
    except RuntimeError:
        pass
    raise InputError(f"{path}: not a sentencepiece model, or a damaged one ({len(model):,} bytes)")
