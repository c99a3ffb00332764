"""Activations that a piece keeps for its backward pass, and what it needs beside while it runs.

Everything is read off the code that runs: `model/` and Megatron-Core's layers with the `native` spec. A
tensor counts where the operation behind it saves it; a view keeps the whole tensor it looks into. On a host
the formulas are held against what torch's allocator gives out (tests/plan); on a GPU, where norms are fused
and experts are grouped products, they follow from the same code and are not measured. The letters:

    T   tokens of a microbatch that this rank's matrices see: s * b / CP
    t   tokens between them: T / TP under sequence parallelism, else T
    h   hidden_size
"""

from __future__ import annotations

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.activations.attention import attention, norm
from megatron_moe.plan.activations.feed_forward import dense, mixture
from megatron_moe.plan.activations.share import Share
from megatron_moe.plan.costs import padded_vocab_size
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.units import Activations, Kind
from megatron_moe.plan.weights import kind_of_mtp_layers

_FP32, _INT64 = 4, 8


def activations(experiment: Experiment, layout: Layout, kind: Kind) -> Activations:
    """Of one piece on one rank, one microbatch; for `mtp` those of all multi-token-prediction layers without
    their losses, which the head computes."""
    share = Share.of(experiment, layout)
    if kind == "embedding":
        return _embedding(experiment, share)
    if kind == "head":
        return _head(experiment, share)
    if kind == "mtp":
        return _mtp(experiment, layout, share)
    return _layer(experiment, layout, share, kind == "moe")


def _embedding(experiment: Experiment, share: Share) -> Activations:
    """Token numbers; what is looked up is the first layer's input."""
    width = experiment.model.hidden_size * share.element
    ids = share.whole * (_INT64 + 1 if share.tensor > 1 else 0)
    gradient = padded_vocab_size(experiment) / share.tensor * width
    return Activations(kept=ids, kept_if_recomputed=ids, working=2 * share.whole * width + gradient)


def _head(experiment: Experiment, share: Share) -> Activations:
    """The final norm, and for each prediction the softmax in fp32, which overwrites logits in fp32."""
    model = experiment.model
    stream = share.mine * model.hidden_size * share.element
    rows = padded_vocab_size(experiment) / share.tensor
    logits = share.whole * rows
    losses = share.whole * (3 * _INT64 + _FP32)
    normed = norm(model.normalization, share.mine, model.hidden_size, share)
    predictions = 1 + model.mtp_num_layers
    kept = normed + predictions * (_FP32 * logits + losses) + model.mtp_num_layers * stream
    # Logits beside their softmax; then their gradient instead, with that of the weight and of the input.
    in_bf16 = share.element * logits if share.element < _FP32 else 0.0
    gathered = share.whole * model.hidden_size * share.element
    gradients = rows * model.hidden_size * share.element + gathered * (2 if share.is_sequence_parallel else 1)
    released = _FP32 * logits if share.element < _FP32 else 0.0
    working = max(in_bf16, in_bf16 + gradients - released)
    return Activations(kept=kept, kept_if_recomputed=stream, working=working)


def _mtp(experiment: Experiment, layout: Layout, share: Share) -> Activations:
    """Each layer's embedding, both norms and the joint projection's input, beside a transformer layer."""
    model = experiment.model
    stream = share.mine * model.hidden_size * share.element
    layer = _layer(experiment, layout, share, kind_of_mtp_layers(experiment) == "moe")
    one_norm = norm(model.normalization, share.mine, model.hidden_size, share)
    own = 3 * one_norm + 2 * stream + share.whole * _INT64
    return Activations(
        kept=model.mtp_num_layers * (layer.kept + own),
        kept_if_recomputed=model.mtp_num_layers * stream,
        working=layer.working,
    )


def _layer(experiment: Experiment, layout: Layout, share: Share, has_experts: bool) -> Activations:
    """A transformer layer: two residual branches, each behind a norm."""
    model = experiment.model
    stream = share.mine * model.hidden_size * share.element
    first = attention(experiment, share)
    if has_experts:
        second = mixture(experiment, layout, share)
    else:
        assert model.ffn_hidden_size is not None
        second = dense(experiment, model.ffn_hidden_size, share, "mlp")
    again = "layernorm" in share.modules
    norms = 2 * (stream if again else norm(model.normalization, share.mine, model.hidden_size, share))
    # A gradient on the residual stream, and a part that works; the buffer that gathers tokens under sequence
    # parallelism, and a gathered gradient.
    gathered = share.whole * model.hidden_size * share.element if share.is_sequence_parallel else 0.0
    # While attention runs, either way, what the second part keeps is not there.
    working = max(stream, second.working, first.working - second.kept)
    return Activations(
        kept=norms + first.kept + second.kept,
        kept_if_recomputed=stream,
        working=working + (1 + again) * stream + 2 * gathered,
    )
