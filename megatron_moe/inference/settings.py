"""What is asked of a generation, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from megatron_moe.inference.sampling import Sampling

Finish: TypeAlias = Literal["stop", "length"]
"""Why a sequence has no more tokens: `stop` at a token that ends it or where the caller stopped it, `length`
where it has as many as it may have."""


@dataclass(frozen=True)
class Settings:
    """What is generated, and how.

    Attributes:
        max_new_tokens: at most so many.
        sampling: which token comes next.
        ends: tokens that end a sequence; they belong to it.
        batch: sequences of a replica at once.
        prefill_tokens: of prompts that one step takes, so that a long one needs no memory for all of it.
    """

    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    ends: Collection[int] = ()
    batch: int = 8
    prefill_tokens: int = 2048


class Token(NamedTuple):
    """One that was generated.

    Attributes:
        prompt: number of the prompt, from 0.
        last: None where its sequence goes on.
    """

    prompt: int
    token: int
    last: Finish | None


@dataclass
class Generated:
    """What became of a prompt: the new tokens, and why there are no more."""

    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None


Stop = Callable[[int, Sequence[int]], bool]
"""Number of a prompt and what was generated for it so far -> whether that is enough."""
