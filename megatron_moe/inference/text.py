"""Tokens as text while they come: whole characters only, and up to where a text is to stop."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron_moe.data.tokenizers import Tokenizer

_UNKNOWN = "\ufffd"
"""What tokenizers make of bytes that are no character, or not yet."""
_WINDOW = 6
"""Tokens before the newest ones that these are decoded with: whether a blank stands between two words is seen
from both."""


class TextStream:
    """The text of one sequence behind its prompt.

    Args:
        prompt: its token ids.
        hidden: ids that stand for no text, such as ends of turns.
        stops: texts at which it ends, without them.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], hidden: Collection[int], stops: Sequence[str]
    ) -> None:
        self.tokenizer, self.hidden, self.stops = tokenizer, hidden, stops
        self.text = ""
        """What is certain: it will not be taken back."""
        self.stopped = False
        """One of the stops was found."""
        self._ids = [token for token in prompt if token not in hidden][-_WINDOW:]
        self._first, self._read = 0, len(self._ids)
        self._held = ""

    def add(self, token: int) -> str:
        """What a further token makes certain, as a rule its own text."""
        if token in self.hidden or self.stopped:
            return ""
        self._ids.append(token)
        new = self._decoded(self._first, len(self._ids))[len(self._decoded(self._first, self._read)) :]
        if new.endswith(_UNKNOWN):
            return ""
        self._first, self._read = max(0, len(self._ids) - _WINDOW), len(self._ids)
        return self._certain(new, at_end=False)

    def end(self) -> str:
        """What is left when no more tokens come: characters of which bytes are missing too."""
        if self.stopped:
            return ""
        rest = self._decoded(self._first, len(self._ids))[len(self._decoded(self._first, self._read)) :]
        self._read = len(self._ids)
        return self._certain(rest, at_end=True)

    def _decoded(self, first: int, last: int) -> str:
        return self.tokenizer.decode(self._ids[first:last])

    def _certain(self, new: str, at_end: bool) -> str:
        """Hold back what may be the beginning of a stop."""
        text = self._held + new
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            text, self._held = text[: min(places)], ""
        elif at_end:
            self._held = ""
        else:
            held = max((_overlap(text, stop) for stop in self.stops), default=0)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of a text that begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
