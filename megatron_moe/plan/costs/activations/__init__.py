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
from megatron_moe.plan.costs.activations.attention import attention, norm
from megatron_moe.plan.costs.activations.feed_forward import dense, mixture
from megatron_moe.plan.costs.activations.share import Share
from megatron_moe.plan.costs.parameters import padded_vocab_size
from megatron_moe.plan.costs.weights import kind_of_mtp_layers
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.units import Activations, Kind

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
    """Which rows of the rank's part are looked up; what is there is the first layer's input."""
    model = experiment.model
    kept = share.whole * (_INT64 + 1 if share.tensor > 1 else 0)
    kept += share.dropped(model.hidden_size, model.hidden_dropout)
    width = model.hidden_size * share.element
    gradient = padded_vocab_size(experiment) / share.tensor * width
    return Activations(kept=kept, kept_if_recomputed=kept, working=2 * share.whole * width + gradient)


def _head(experiment: Experiment, share: Share) -> Activations:
    """The final norm, and for each prediction the softmax in fp32, which overwrites logits in fp32."""
    model = experiment.model
    rows, width = padded_vocab_size(experiment) / share.tensor, model.hidden_size * share.element
    predictions = 1 + model.mtp_num_layers
    logits = share.whole * rows
    losses = share.whole * (_INT64 + 1)  # where the target's logit is, if it is on this rank
    kept = norm(model.normalization, share.mine, model.hidden_size, share)
    kept += predictions * (_FP32 * logits + losses)
    # Logits beside their softmax; then their gradient instead, with that of the weight and of the input.
    in_bf16, released = (share.element * logits, _FP32 * logits) if share.element < _FP32 else (0.0, 0.0)
    gathered = 2 * share.whole * width if share.is_sequence_parallel else 0.0
    gradients = in_bf16 + rows * width + share.whole * width - released
    return Activations(
        kept=kept, kept_if_recomputed=share.mine * width, working=max(in_bf16, gradients) + gathered
    )


def _mtp(experiment: Experiment, layout: Layout, share: Share) -> Activations:
    """For each layer norms of the further tokens' embeddings and of the hidden states, both together as the
    joint projection's input, a transformer layer, and a norm whose result the output layer keeps."""
    model = experiment.model
    stream = share.mine * model.hidden_size * share.element
    layer = _layer(experiment, layout, share, kind_of_mtp_layers(experiment) == "moe")
    one_norm = norm(model.normalization, share.mine, model.hidden_size, share)
    of_hidden = norm(model.normalization, share.mine, model.hidden_size, share, has_input=False)
    # What the first two norms give is not kept itself, but copied into one tensor.
    own = 2 * one_norm + of_hidden
    ids = _embedding(experiment, share).kept
    return Activations(
        kept=model.mtp_num_layers * (layer.kept + own + ids),
        kept_if_recomputed=model.mtp_num_layers * stream,
        working=layer.working + (2 * share.whole * model.hidden_size * share.element),
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
    dropped = 2 * share.dropped(model.hidden_size, model.hidden_dropout)
    return Activations(
        kept=norms + first.kept + second.kept + dropped,
        kept_if_recomputed=stream,
        working=working + (1 + again) * stream + 2 * gathered,
    )
