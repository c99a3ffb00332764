"""What serving a model takes: its weights, and keys and values of the context, over the ranks of one replica.

Every layer is split over all ranks. Query heads are dealt out by divmod, the first ranks having one more, and
key and value heads with the queries that read them; so is the cache. What lies between (the columns of
feed-forwards and experts, the rows of the vocabulary) is split evenly. Narrow projections of latent
attention, norms and gates are on every rank. In fp8 every matrix takes a byte an element, embeddings too;
gates, norms and biases stay in bf16, and so does the cache. Scales, which are a number a matrix, and what a
step needs while it runs are not counted; for that is `launch.cluster.reserved_gib`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.plan.costs.parameters import count_parameters, padded_vocab_size
from megatron_moe.plan.costs.weights import attention_weights, weights_of
from megatron_moe.plan.stages import moe_layers
from megatron_moe.plan.units import Kind

DType = Literal["bf16", "fp8"]

_HIGH_BYTES = 2
"""Of what is not quantised."""
_MATRIX_BYTES: dict[DType, int] = {"bf16": 2, "fp8": 1}
_GIB = 2**30


@dataclass(frozen=True)
class Rank:
    """What one rank holds."""

    query_heads: int
    kv_heads: int
    """Heads whose keys and values it caches; of latent attention, which all heads share, 0."""
    weights_bytes: int
    cache_bytes_per_token: int
    """Of one token of one sequence, all layers."""


@dataclass(frozen=True)
class Serving:
    """An answer.

    Attributes:
        gpus_needed: the fewest that hold the weights and the request; None where no number does, or where the
            memory is not known.
        memory_bytes: of each GPU; None where it is not known.
        reserved_bytes: of that, not to be planned with.
        batch, context: the request: so many sequences of so many tokens.
        parameters: of the model.
    """

    dtype: DType
    gpus_needed: int | None
    memory_bytes: float | None
    reserved_bytes: float
    batch: int
    context: int
    parameters: int
    ranks: tuple[Rank, ...]

    @property
    def weights_bytes(self) -> int:
        """On all ranks."""
        return sum(rank.weights_bytes for rank in self.ranks)

    @property
    def cache_bytes_per_token(self) -> int:
        """On all ranks."""
        return sum(rank.cache_bytes_per_token for rank in self.ranks)

    def free_bytes(self, rank: Rank) -> float | None:
        """What the request leaves of a rank's memory; negative where it does not fit."""
        if self.memory_bytes is None:
            return None
        cache = self.batch * self.context * rank.cache_bytes_per_token
        return self.memory_bytes - self.reserved_bytes - rank.weights_bytes - cache

    @property
    def fits(self) -> bool | None:
        """Whether every rank holds its weights and its part of the request."""
        free = [self.free_bytes(rank) for rank in self.ranks]
        return all(room >= 0 for room in free if room is not None) if None not in free else None

    @property
    def most_tokens(self) -> int | None:
        """Tokens of all sequences together that the cache has room for; 0 where the weights do not fit."""
        if self.memory_bytes is None:
            return None
        usable = self.memory_bytes - self.reserved_bytes
        rooms = [(usable - rank.weights_bytes) // rank.cache_bytes_per_token for rank in self.ranks]
        return max(0, int(min(rooms)))

    def record(self) -> dict[str, object]:
        """For `--json`."""
        most = self.most_tokens
        return {
            "dtype": self.dtype,
            "parameters": self.parameters,
            "gpus": len(self.ranks),
            "gpus_needed": self.gpus_needed,
            "memory_bytes_per_gpu": self.memory_bytes,
            "memory_bytes": None if self.memory_bytes is None else self.memory_bytes * len(self.ranks),
            "reserved_bytes_per_gpu": self.reserved_bytes,
            "weights_bytes": self.weights_bytes,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "batch": self.batch,
            "context": self.context,
            "fits": self.fits,
            "most_tokens": most,
            "longest_context": None if most is None else most // self.batch,
            "largest_batch": None if most is None else most // self.context,
            "ranks": [asdict(rank) | {"free_bytes": self.free_bytes(rank)} for rank in self.ranks],
        }


def serving(
    experiment: Experiment,
    gpus: int | None,
    batch: int = 1,
    context: int | None = None,
    dtype: DType = "bf16",
) -> Serving:
    """What serving a filled experiment's model takes.

    Args:
        gpus: ranks of the replica; None: as few as hold the model and the request.
        context: tokens of each sequence; None: training.seq_length.

    Raises InputError where the model cannot be split over so many ranks.
    """
    cluster = experiment.launch.cluster
    assert cluster.reserved_gib is not None
    memory = None if cluster.memory_gib is None else cluster.memory_gib * _GIB

    def on(ranks: int, needed: int | None = None) -> Serving:
        return Serving(
            dtype=dtype,
            gpus_needed=needed,
            memory_bytes=memory,
            reserved_bytes=cluster.reserved_gib * _GIB if cluster.reserved_gib else 0.0,
            batch=batch,
            context=context or experiment.training.seq_length,
            parameters=count_parameters(experiment).total,
            ranks=tuple(_ranks(experiment, ranks, dtype)),
        )

    possible = [n for n in range(1, experiment.model.num_attention_heads + 1) if not _uneven(experiment, n)]
    if gpus is not None and gpus not in possible:
        raise InputError(_refusal(experiment, gpus, possible))
    needed = next((n for n in possible if on(n).fits), None)
    return on(gpus or needed or (possible[-1] if memory is not None else 1), needed)


def _uneven(experiment: Experiment, ranks: int) -> list[str]:
    """Keys of widths that so many ranks do not divide."""
    model, moe = experiment.model, experiment.moe
    widths: dict[str, int | None] = {}
    if len(moe_layers(experiment)) < model.num_layers:
        widths["model.ffn_hidden_size"] = model.ffn_hidden_size
    if moe is not None and moe_layers(experiment):
        # Whole experts on each rank are as good as a part of each.
        if moe.num_moe_experts % ranks:
            widths["moe.moe_ffn_hidden_size"] = moe.moe_ffn_hidden_size
        widths["moe.moe_shared_expert_intermediate_size"] = moe.moe_shared_expert_intermediate_size
    keys = [key for key, width in widths.items() if width is not None and width % ranks]
    return keys + ["the padded vocabulary"] * bool(padded_vocab_size(experiment) % ranks)


def _refusal(experiment: Experiment, gpus: int, possible: list[int]) -> str:
    heads = experiment.model.num_attention_heads
    if gpus > heads:
        return f"--gpus {gpus}: each GPU needs a head, and the model has {heads}: use at most {possible[-1]}"
    below = max(n for n in possible if n < gpus)
    above = next((n for n in possible if n > gpus), None)
    use = f"{below} or {above}" if above else str(below)
    return f"--gpus {gpus} does not divide {', '.join(_uneven(experiment, gpus))}: use {use}"


def heads_of_ranks(query_heads: int, kv_heads: int, ranks: int) -> list[tuple[int, int]]:
    """Query heads and key-value heads of each rank.

    Key-value heads are dealt out with their queries; where they are fewer than ranks, queries are, and a rank
    has a copy of each key-value head that one of its queries reads.
    """
    together = query_heads // kv_heads
    if kv_heads >= ranks:
        return [(together * count, count) for _, count in dealt(kv_heads, ranks)]
    return [
        (count, (first + count - 1) // together - first // together + 1)
        for first, count in dealt(query_heads, ranks)
    ]


def dealt(things: int, ranks: int) -> Iterator[tuple[int, int]]:
    """The first thing and the number of them on each rank."""
    each, rest = divmod(things, ranks)
    first = 0
    for rank in range(ranks):
        count = each + (rank < rest)
        yield first, count
        first += count


def _ranks(experiment: Experiment, ranks: int, dtype: DType) -> Iterator[Rank]:
    model = experiment.model
    assert model.num_query_groups is not None and model.kv_channels is not None
    latent, heads = model.multi_latent_attention, model.num_attention_heads
    groups = heads if latent else model.num_query_groups
    others = _beside_attention(experiment, ranks, dtype)
    for query_heads, kv_heads in heads_of_ranks(heads, groups, ranks):
        size = 0.0
        for weights in attention_weights(experiment):
            part = 1.0 if weights.split == "no" else query_heads / heads
            size += part * weights.total * (_MATRIX_BYTES[dtype] if weights.multiplied else _HIGH_BYTES)
        if latent:
            cached = latent.kv_lora_rank + latent.qk_pos_emb_head_dim
        else:
            cached = 2 * kv_heads * model.kv_channels
            copied_heads = kv_heads - groups * query_heads / heads
            size += 2 * copied_heads * model.kv_channels * model.hidden_size * _MATRIX_BYTES[dtype]
        yield Rank(
            query_heads=query_heads,
            kv_heads=0 if latent else kv_heads,
            weights_bytes=round(model.num_layers * size) + others,
            cache_bytes_per_token=model.num_layers * cached * _HIGH_BYTES,
        )


def _beside_attention(experiment: Experiment, ranks: int, dtype: DType) -> int:
    """Bytes of all other weights on each rank; multi-token prediction is for training."""
    with_experts = len(moe_layers(experiment))
    counts: dict[Kind, int] = {
        "embedding": 1,
        "dense": experiment.model.num_layers - with_experts,
        "moe": with_experts,
        "head": 1,
    }
    size = 0
    for kind, count in counts.items():
        weights = weights_of(experiment, kind, padded_vocab_size(experiment)) if count else []
        if kind in ("dense", "moe") and count:
            for attention in attention_weights(experiment):
                weights.remove(attention)
        for part in weights:
            # Gates are whole on every rank.
            is_matrix = part.split != "no" and (part.multiplied > 0 or kind == "embedding")
            part_bytes = part.total * (_MATRIX_BYTES[dtype] if is_matrix else _HIGH_BYTES)
            size += count * part_bytes // (1 if part.split == "no" else ranks)
    return size
