"""Ranks in tiktoken's form: byte-pair merges by rank, over words that a regular expression cuts out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_moe.config.errors import InputError
from megatron_moe.config.model_file import read_model
from megatron_moe.config.tokenizer_files import TIKTOKEN_EOD, eod_rank, read_ranks
from megatron_moe.data.cutting import Cuts, parts
from megatron_moe.data.packed import optional
from megatron_moe.data.word_patterns import TIKTOKEN

DEFAULT_PATTERN = "cl100k_base"
_PART_CHARACTERS = 1 << 20
_PROBE = "A word, 12 of them;\n\n\ttwo  lines: «é»\n"


class TiktokenTokenizer:
    """Ranks, an expression, and one special token, which no text has: what spells it is ordinary text."""

    kind = "tiktoken"

    def __init__(self, path: str | Path, eod: str | None = None, pattern: str | None = None) -> None:
        """Read the ranks.

        Args:
            eod: the token that ends a document: its own id if it is one of the ranks, else the first id
                behind them.
            pattern: one of `TIKTOKEN`, or a regular expression.

        InputError for what are no ranks, and for what is no expression, or leaves out some characters.
        """
        library = optional("tiktoken", "tiktoken", str(path))
        ranks = read_ranks(path)
        self.eod = eod_rank(ranks, eod)
        self.vocab_size = max(*ranks.values(), self.eod) + 1
        self._pattern = name = pattern or DEFAULT_PATTERN
        expression = TIKTOKEN.get(name, name)
        self.cuts: Cuts = "behind words" if name in TIKTOKEN else "nowhere"
        decides = [
            hashlib.sha256(read_model(path, "tiktoken's ranks")).hexdigest(),
            str(self.eod),
            expression,
        ]
        self.sha256 = hashlib.sha256("\0".join(decides).encode()).hexdigest()
        end = eod or TIKTOKEN_EOD
        try:
            # A name that tiktoken does not know: pickled, an encoding of a known one is only its name.
            self._encoding = library.Encoding(
                "megatron_moe",
                pat_str=expression,
                mergeable_ranks=ranks,
                special_tokens={} if end.encode() in ranks else {end: self.eod},
            )
        except ValueError as error:
            known = ", ".join(TIKTOKEN)
            raise InputError(
                f"pattern: '{name}' is none of {known}, and no regular expression: {error}"
            ) from None
        self._encode(_PROBE)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.encode_many([text])[0].tolist()
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return [self._encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; ends of documents vanish."""
        return str(self._encoding.decode([token for token in ids if token != self.eod]))

    def _encode(self, text: str) -> NDArray[Any]:
        encode = self._encoding.encode_to_numpy
        try:
            found = [encode(part, disallowed_special=()) for part in parts(text, self.cuts, _PART_CHARACTERS)]
        except BaseException as error:
            # Where Rust gives up, it is not even an Exception.
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            raise InputError(f"pattern: '{self._pattern}' cannot be matched to a text: {error}") from None
        ids = found[0] if len(found) == 1 else np.concatenate(found)
        if self._pattern not in TIKTOKEN:
            self._check_whole(text, ids)
        return ids

    def _check_whole(self, text: str, ids: NDArray[Any]) -> None:
        spelled = self._encoding.decode_bytes(ids.tolist())
        if spelled != text.encode():
            # Where both go apart; at the end if only the end is left out.
            pairs = zip(spelled.decode(errors="replace"), text, strict=False)
            place = next((at for at, (a, b) in enumerate(pairs) if a != b), -1)
            raise InputError(
                f"pattern: '{self._pattern}' leaves out {text[place]!r} in a text; it has to match every "
                f"character, or to be one of {', '.join(TIKTOKEN)}"
            )
