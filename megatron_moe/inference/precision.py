"""How far FP8 moves what a model says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.inference.network import Network
from megatron_moe.inference.step import Piece, Step


@dataclass(frozen=True)
class LogitError:
    """Of logits against exact ones.

    Attributes:
        largest: largest difference of a logit.
        mean: mean difference.
        spread: standard deviation of the exact logits, which tells how much that is.
        same: part of the tokens whose most likely successor is the same.
        tokens: that were looked at.
    """

    largest: float
    mean: float
    spread: float
    same: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"logits differ by {self.mean:.3g} on average and {self.largest:.3g} at most, where they spread "
            f"by {self.spread:.3g}; {self.same:.1%} of {self.tokens} tokens have the same most likely "
            "successor"
        )


def logits_of(network: Network, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [t, v] behind each token of the prompts, on all ranks. A collective over a replica."""
    found = []
    for prompt in prompts:
        step = Step((Piece(0, 0, prompt),), network.device)
        hidden = network.hidden(step, None)
        logits = torch.empty(len(prompt), network.vocab_size, device=network.device)
        found.append(network.from_last(logits if hidden is None else network.logits(hidden).contiguous()))
    return found


def logit_error(exact: Sequence[Tensor], found: Sequence[Tensor]) -> LogitError:
    """Over all prompts."""
    ours, theirs = torch.cat(list(found)), torch.cat(list(exact))
    difference = (ours - theirs).abs()
    return LogitError(
        largest=float(difference.max()),
        mean=float(difference.mean()),
        spread=float(theirs.std()),
        same=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        tokens=len(theirs),
    )
