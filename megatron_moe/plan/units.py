"""The pieces that pipeline stages are made of, and what each costs: what the planner places, simulates and
adds up.

A piece is the embedding, one layer, the multi-token-prediction layers, or the final norm with output layer
and loss. Costs are those of one rank that holds it, and where they are of activations or times, of one
microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["embedding", "dense", "moe", "mtp", "head"]
"""`mtp`: all multi-token-prediction layers; `head`: final norm, output layer and loss, theirs too, which
Megatron-Core computes there wherever these layers are."""

LAYERS: tuple[Kind, ...] = ("dense", "moe")
"""The kinds that stages share among them, and whose activations can be computed again."""


@dataclass(frozen=True)
class StaticBytes:
    """What lies in memory from the first step to the last, in bytes."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer

    def __add__(self, other: StaticBytes) -> StaticBytes:
        return StaticBytes(
            self.weights + other.weights, self.gradients + other.gradients, self.optimizer + other.optimizer
        )


@dataclass(frozen=True)
class Activations:
    """Bytes of one microbatch."""

    kept: float
    """From the forward to the backward pass, with what `recompute.modules` frees already left out."""
    kept_if_recomputed: float
    """The same where the whole piece is computed again: its input."""
    working: float
    """What the forward or the backward pass of the piece needs beside that while it runs, the larger; what is
    recomputed counts here, for one piece at a time."""


@dataclass(frozen=True)
class Times:
    """Seconds of one microbatch, exposed communication included."""

    forward_s: float
    backward_s: float
    """With what `recompute.modules` computes again."""
    recompute_s: float
    """By how much longer the backward pass takes where the whole piece is computed again."""
    weight_gradient_s: float
    """The part of `backward_s` that only the optimizer waits for; a zero-bubble schedule puts it off."""
    exposed_s: float
    """The part of forward and backward that waits for the experts' all-to-all."""
    hidden_s: float
    """All-to-all that goes on under computation, forward and backward; no part of the times above."""


@dataclass(frozen=True)
class Unit:
    """One piece on one rank."""

    kind: Kind
    memory: StaticBytes
    activations: Activations
    times: Times


@dataclass(frozen=True)
class Units:
    """A model in pieces, in the order in which a token passes them, for one layout.

    Attributes:
        embedding: before the first layer of the first stage.
        layers: one entry a layer; layers of one kind share their entry.
        mtp: None where the model has no multi-token prediction.
        head: behind the last layer of the last stage.
        shared_embedding: what the last stage holds of the embedding beside its own pieces where it is tied to
            the output layer and PP is above 1.
        mtp_embedding: what the stage with the multi-token-prediction layers holds of the embedding where it
            is not the first, beside that (Megatron-Core keeps two copies where both are needed).
        transfer_s: sending one microbatch's activations, or their gradients, to the next stage.
        transfer_bytes: what is sent.
        source: where the times come from, for the user to read.
    """

    embedding: Unit
    layers: tuple[Unit, ...]
    mtp: Unit | None
    head: Unit
    shared_embedding: StaticBytes
    transfer_s: float
    transfer_bytes: float
    source: str
    mtp_embedding: StaticBytes = StaticBytes(0, 0, 0)


def pieces_of(units: Units) -> list[Unit]:
    """All pieces, in the order in which a token passes them."""
    return [units.embedding, *units.layers, *([units.mtp] if units.mtp else []), units.head]
