"""Which layers have a sliding window, and how many keys a token sees."""

from __future__ import annotations

from megatron_moe.config.schema import Experiment


def windowed_layers(experiment: Experiment) -> list[bool]:
    """Of each layer whether it has model.sliding_window."""
    model = experiment.model
    which, layers = model.window_attn_skip_freq, range(1, model.num_layers + 1)
    if model.sliding_window is None:
        return [False for _ in layers]
    if isinstance(which, list):
        return [bool(entry) for entry in which]
    return [which is None or layer % which != 0 for layer in layers]


def keys_of_token(experiment: Experiment) -> float:
    """Keys of a token's scores, a mean over layers, as if causality hid nothing: the sequence s, or with a
    window w (2 - w / s). Twice the mean number that is seen."""
    length, window = experiment.training.seq_length, experiment.model.sliding_window
    if window is None or window >= length:
        return float(length)
    with_window = windowed_layers(experiment)
    narrow = window * (2 - window / length)
    return sum(narrow if narrow_here else length for narrow_here in with_window) / len(with_window)
