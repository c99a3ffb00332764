"""What ranks are asked: how likely ends of sequences are, and how prompts go on; how texts become such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from megatron_moe.config.errors import InputError
from megatron_moe.convert.models import Model, read_config
from megatron_moe.data.documents import BadRecord
from megatron_moe.data.huggingface import HuggingFaceTokenizer
from megatron_moe.data.instruction.chat import Chat
from megatron_moe.data.instruction.messages import ASSISTANT
from megatron_moe.data.tokenizers import Tokenizer


class Ending(NamedTuple):
    """A sequence of tokens whose end, from `start` on, is to be likely."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Continuations:
    """Prompts to be continued, all in the same way.

    Attributes:
        prompts: [n] lists of ids.
        stops: texts before which a continuation ends.
    """

    prompts: list[list[int]]
    stops: list[str] = field(default_factory=list)
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Questions:
    """All that one task asks."""

    endings: list[Ending] = field(default_factory=list)
    continuations: Continuations | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Questions:
        """What `to_json` gave."""
        asked = record["continuations"]
        endings = [Ending(*ending) for ending in record["endings"]]
        return cls(endings, None if asked is None else Continuations(**asked))


class Answer(NamedTuple):
    """How likely an ending is: the sum over its tokens of natural logarithms, and whether each of them is the
    most likely one."""

    log_prob: float
    is_greedy: bool


@dataclass(frozen=True)
class Answers:
    """What came of `Questions`, in their order.

    Attributes:
        texts: of the continuations.
    """

    endings: list[Answer]
    texts: list[str]

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Answers:
        return cls([Answer(*answer) for answer in record["endings"]], record["texts"])


@dataclass(frozen=True)
class Prompt:
    """What stands before an answer.

    Attributes:
        description: before everything.
        examples: questions and their answers.
    """

    description: str
    examples: Sequence[tuple[str, str]]
    question: str
    separator: str
    example_separator: str


class Encoder:
    """Texts as questions.

    Args:
        chat: asks in the form of a chat; None: plain text.
        length: most tokens of a sequence.
        first: an id behind which a text may begin (see `first_of`); None: the tokenizer's end of document.
    """

    def __init__(
        self, tokenizer: Tokenizer, chat: Chat | None, length: int, first: int | None = None
    ) -> None:
        self.tokenizer, self.chat, self.length = tokenizer, chat, length
        self.beginning = _beginning(tokenizer)
        """Ids that the tokenizer puts before a text, as a rule one or none."""
        self.before_all = self.beginning or [tokenizer.eod if first is None else first]
        """What stands before a text whose first token is to be predicted."""
        self.cut = 0
        """Prompts whose beginning was left out, as they were too long."""

    def text(self, text: str) -> list[int]:
        """The ids of a text with what begins it."""
        ids, begin = self.tokenizer.encode(text), self.beginning
        return ids if begin and ids[: len(begin)] == begin else [*begin, *ids]

    def ending(self, prompt: Prompt, answer: str) -> Ending:
        """An answer behind a prompt."""
        if self.chat is not None:
            return self._cut([int(token) for token in self._asked(prompt)], self.tokenizer.encode(answer))
        return self.pair(_plain(prompt), prompt.separator + answer)

    def pair(self, context: str, continuation: str) -> Ending:
        """A text behind another one: blanks between them are the second one's, and the tokens of both
        together are cut where the first one's end, as lm-evaluation-harness does."""
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        if not context:
            return self._cut(self.before_all, self.tokenizer.encode(continuation))
        before = self.text(context)
        behind = self.text(context + continuation)[len(before) :]
        # Both together may be a single token.
        return self._cut(before, behind or self.tokenizer.encode(continuation))

    def prompt(self, prompt: Prompt, room: int) -> list[int]:
        """A prompt that leaves room for so many tokens."""
        if self.chat is not None:
            ids = [int(token) for token in self._asked(prompt)]
        else:
            # A blank at the end would be a token of its own, which no text has there.
            ids = self.text(_plain(prompt).rstrip(" "))
        return self.fitted(ids, room)

    def fitted(self, ids: list[int], room: int) -> list[int]:
        """Ids behind which there is room for so many others: their beginning is left out as far as it has
        to be."""
        most = max(1, self.length - room)
        self.cut += len(ids) > most
        return (ids or self.before_all)[-most:]

    def _asked(self, prompt: Prompt) -> Any:
        assert self.chat is not None
        messages = [{"role": "system", "content": prompt.description}] if prompt.description else []
        for question, answer in prompt.examples:
            messages += [{"role": "user", "content": question}, {"role": ASSISTANT, "content": answer}]
        try:
            return self.chat.prompt([*messages, {"role": "user", "content": prompt.question}])
        except BadRecord as error:
            raise InputError(f"--chat: {error}") from None

    def _cut(self, before: list[int], behind: list[int]) -> Ending:
        ids = [*before, *behind]
        left_out = max(0, len(ids) - self.length)
        self.cut += left_out > 0
        return Ending(ids[left_out:], max(1, len(before) - left_out))


def first_of(model: Model) -> int | None:
    """The beginning of a text that config.json names, which lm-evaluation-harness puts before texts without a
    prompt even where the tokenizer does not."""
    if model.huggingface is None:
        return None
    config, _ = read_config(model.huggingface)
    found = config.get("bos_token_id")
    return found if isinstance(found, int) else None


def _plain(prompt: Prompt) -> str:
    gap = prompt.example_separator
    shown = [f"{question}{prompt.separator}{answer}{gap}" for question, answer in prompt.examples]
    return (prompt.description + gap if prompt.description else "") + "".join(shown) + prompt.question


def _beginning(tokenizer: Tokenizer) -> list[int]:
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return []
    plain, whole = tokenizer.encode("a"), tokenizer.encode_whole("a")
    starts = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return whole[: next(starts, 0)]
