"""Which token comes next.

A draw is a function of (seed, number of the prompt, position in its sequence) and of nothing else: neither
what else is in the batch nor how the model is laid out changes it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only the k most likely ones are left; None: all.
        top_p: only the most likely ones that together have at least this probability are left (nucleus
            sampling, Holtzman et al. 2020); 1: all. Of what top_k left.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0


def choose(logits: Tensor, sampling: Sampling, prompts: list[int], positions: list[int]) -> Tensor:
    """The next tokens [b].

    Args:
        logits: [b, v] float32.
        prompts: number of each row's prompt.
        positions: of each row's next token in its sequence.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # In double precision, so that the sum over a vocabulary is where it should be. In the order of the tokens
    # and not of their probabilities: rounding changes the order of two that are nearly alike.
    sums = distribution(logits, sampling).double().cumsum(-1)
    draws = [draw(sampling.seed, *where) for where in zip(prompts, positions, strict=True)]
    limits = torch.tensor(draws, dtype=torch.float64, device=logits.device)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, limits, right=True).clamp_(max=sums.size(-1) - 1).squeeze(-1)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [b, v] of all tokens, 0 for those that are not left. They need not add up to 1."""
    scaled = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.size(-1):
        least = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probabilities = scaled.softmax(-1)
    if sampling.top_p < 1:
        falling, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        before = falling.double().cumsum(-1) - falling
        probabilities = torch.zeros_like(falling).scatter_(
            1, tokens, falling.masked_fill(before >= sampling.top_p, 0)
        )
    return probabilities


def draw(seed: int, prompt: int, position: int) -> float:
    """A number from 0 up to 1, evenly distributed."""
    digest = hashlib.sha256(f"{seed}:{prompt}:{position}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2.0**64
