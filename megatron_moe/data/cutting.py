"""Where a document may be cut so that its parts have the ids of the whole.

A long text is read and encoded in parts, for speed and memory, where that cannot change a single id. What
that takes depends on the tokenizer.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import Literal

Cuts = Literal["nowhere", "behind newlines", "behind words"]
"""`behind newlines`: encode(a + b) == encode(a) + encode(b) wherever a ends with a newline. `behind words`:
the same where a ends with a letter or digit and b begins with a blank: expressions that cut text into words
from left to right, and look back at nothing, end a word there and begin anew."""

_WORD_END = re.compile(r"[^\W_](?=[ \t\r\n])")
_LATEST_LETTER = "\uffff"
"""Letters beyond are newer than some libraries' tables."""
_TAIL_BYTES = 1 << 16


def last_cut(block: bytes, cuts: Cuts) -> int:
    """The last place, in bytes from its beginning, where `block` may be cut; 0 if there is none.

    Args:
        block: UTF-8, which may end inside a character. Only its last 64 KiB are looked at.
    """
    if cuts == "nowhere":
        return 0
    if cuts == "behind newlines":
        return block.rfind(b"\n") + 1
    start = max(0, len(block) - _TAIL_BYTES)
    while start < len(block) and block[start] & 0xC0 == 0x80:  # inside a character
        start += 1
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        tail = decoder.decode(block[start:])
    except UnicodeDecodeError:  # the whole is no text, which whoever decodes it says
        return len(block)
    end = max((match.end() for match in _WORD_END.finditer(tail) if match[0] <= _LATEST_LETTER), default=None)
    if end is None:
        return 0
    begun_character, _ = decoder.getstate()
    return len(block) - len(begun_character) - len(tail[end:].encode())


def parts(text: str, cuts: Cuts, at_least: int) -> Iterator[str]:
    """`text` in parts of about `at_least` characters, cut where that is allowed, or else later."""
    begin = 0
    if cuts == "behind newlines":
        while 0 < (newline := text.find("\n", begin + at_least) + 1) < len(text):
            yield text[begin:newline]
            begin = newline
    elif cuts == "behind words":
        while match := _word_end(text, begin + at_least):
            yield text[begin:match]
            begin = match
    yield text[begin:]


def _word_end(text: str, begin: int) -> int:
    ends = (match.end() for match in _WORD_END.finditer(text, begin) if match[0] <= _LATEST_LETTER)
    return next(ends, 0)
