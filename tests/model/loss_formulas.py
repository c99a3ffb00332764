"""The balancing losses in float64 numpy, straight from the papers: an independent reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Routed:
    """One microbatch. The choice of experts is given, everything else follows from the logits.

    Attributes:
        logits: [s, b, e].
        experts: [s, b, k] the chosen ones, the first choice first.
        valid: [s, b] bool.
        sigmoid: scores are sigmoids over their sum, else the softmax.
        groups: D, devices that hold e/D experts each.
        most_groups: M, the most devices that a token is sent to.
        previous: [e] assignments in the previous global batch.
    """

    logits: Array
    experts: NDArray[np.int64]
    valid: NDArray[np.bool_]
    sigmoid: bool = False
    groups: int = 3
    most_groups: int = 2
    previous: Array | None = None

    @property
    def scores(self) -> Array:
        """[t, e] of the valid tokens."""
        logits = self.logits[self.valid]
        raw = 1 / (1 + np.exp(-logits)) if self.sigmoid else np.exp(logits)
        return np.asarray(raw / raw.sum(-1, keepdims=True))

    @property
    def weights(self) -> Array:
        """[t, e] gate weights: over the chosen experts alone."""
        kept = np.where(self.chosen, self.scores, 0.0)
        return np.asarray(kept / kept.sum(-1, keepdims=True))

    @property
    def chosen(self) -> NDArray[np.bool_]:
        """[t, e]."""
        return np.asarray((self.experts[self.valid][..., None] == np.arange(self.e)).any(1))

    @property
    def e(self) -> int:
        return self.logits.shape[-1]

    @property
    def k(self) -> int:
        return self.experts.shape[-1]

    def sequence(self, number: int) -> Routed:
        """One sequence as a microbatch of its own."""
        which = slice(number, number + 1)
        return Routed(self.logits[:, which], self.experts[:, which], self.valid[:, which], self.sigmoid)


def switch(x: Routed) -> float:
    """Switch Transformer, eqs. 4 to 6, f over the k choices."""
    tokens = len(x.scores)
    return float(sum(x.chosen[:, j].sum() / (tokens * x.k) * x.scores[:, j].mean() for j in range(x.e)) * x.e)


def sequence_wise(x: Routed) -> float:
    """DeepSeek-V3, eqs. 17 to 20, the mean over the sequences; one without tokens adds nothing."""
    count = x.logits.shape[1]
    return sum(switch(x.sequence(n)) for n in range(count) if x.valid[:, n].any()) / count


def global_batch(x: Routed) -> float:
    """The Switch form with the fractions of the previous batch."""
    previous = np.ones(x.e) if x.previous is None else x.previous
    return float(x.e * (previous / previous.sum() * x.scores.mean(0)).sum())


def skywork(x: Routed) -> float:
    """Skywork-MoE, eq. 4."""
    return float(((1 / x.e - x.scores.mean(0)) ** 2).sum())


def gshard(x: Routed) -> float:
    """GShard, algorithm 1: (1/E) sum_e (c_e / S) m_e."""
    first = x.experts[x.valid][:, 0]
    return float(sum((first == j).sum() / len(first) * x.scores[:, j].mean() for j in range(x.e)) / x.e)


def importance(x: Routed) -> float:
    """Sparsely-Gated, eqs. 6 and 7."""
    sums = x.weights.sum(0)
    return float((sums.std() / sums.mean()) ** 2)


def load(x: Routed) -> float:
    """Sparsely-Gated, eqs. 10 and 11, of a gate whose probability of choosing an expert is sigmoid(z)."""
    sums = (1 / (1 + np.exp(-x.logits[x.valid]))).sum(0)
    return float((sums.std() / sums.mean()) ** 2)


def device(x: Routed) -> float:
    """DeepSeek-V2, eqs. 26 to 28."""
    f = x.e / (x.k * len(x.scores)) * x.chosen.sum(0)
    parts = zip(np.split(f, x.groups), np.split(x.scores.mean(0), x.groups), strict=True)
    return float(sum(mine.mean() * p.sum() for mine, p in parts))


def communication(x: Routed) -> float:
    """DeepSeek-V2, eqs. 29 to 31."""
    total, size = 0.0, x.e // x.groups
    for i in range(x.groups):
        held = slice(i * size, (i + 1) * size)
        sent = x.chosen[:, held].any(1).sum() * x.groups / (x.most_groups * len(x.scores))
        total += sent * x.scores.mean(0)[held].sum()
    return total


def z(x: Routed) -> float:
    """ST-MoE, eq. 5."""
    return float((np.log(np.exp(x.logits[x.valid]).sum(-1)) ** 2).mean())


FORMULAS: dict[str, Callable[[Routed], float]] = {
    "aux_loss": switch,
    "seq_aux_loss": sequence_wise,
    "global_aux_loss": global_batch,
    "skywork_aux_loss": skywork,
    "gshard_aux_loss": gshard,
    "importance_loss": importance,
    "load_loss": load,
    "device_aux_loss": device,
    "communication_aux_loss": communication,
}


def gradient(formula: Callable[[Routed], float], x: Routed, step: float = 1e-6) -> Array:
    """[s, b, e] by central differences, the choice of experts held."""
    result = np.zeros_like(x.logits)
    for place in np.ndindex(*x.logits.shape):
        sides = []
        for sign in (1, -1):
            moved = x.logits.copy()
            moved[place] += sign * step
            sides.append(formula(Routed(**{**vars(x), "logits": moved})))
        result[place] = (sides[0] - sides[1]) / (2 * step)
    return result
