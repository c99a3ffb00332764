"""What config.json says of the parts that all families share, and back: sizes, heads, positions, windows."""

from __future__ import annotations

import math
from typing import Any

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.config_json import ConfigJson
from megatron_moe.convert.rotary_config import read_rotary, write_rotary
from megatron_moe.convert.windows import layers_with_window

Values = dict[str, Any]

_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
_ROWS = 128
"""Of the padded vocabulary: a model that comes in is padded to no more than its own rows."""


def read_transformer(
    config: ConfigJson,
    epsilon: float,
    theta: float = 10000.0,
    head_dim: int | None = None,
    scaling: Values | None = None,
) -> Values:
    """Keys of `model` of a family with grouped-query attention and rotary positions.

    Args: the family's defaults of rms_norm_eps, rope_theta, head_dim (None: hidden_size over the heads) and
        rope_parameters.
    """
    return read_backbone(config, epsilon) | read_heads(config, head_dim) | read_rotary(config, theta, scaling)


def write_transformer(e: Experiment) -> Values:
    """The other way round."""
    return write_backbone(e) | write_heads(e) | write_rotary(e)


def read_backbone(config: ConfigJson, epsilon: float) -> Values:
    """Keys of `model` that have nothing to do with attention.

    Args:
        epsilon: the family's default of rms_norm_eps.
    """
    vocabulary = config.integer("vocab_size")
    activation = config.get("hidden_act", default="silu")
    if activation not in _ACTIVATIONS:
        config.refuse("hidden_act", f"is none of {', '.join(_ACTIVATIONS)}")
    return {
        "num_layers": config.layers(),
        "hidden_size": config.integer("hidden_size"),
        "ffn_hidden_size": config.integer("intermediate_size"),
        "vocab_size": vocabulary,
        "make_vocab_size_divisible_by": math.gcd(vocabulary, _ROWS),
        "max_position_embeddings": config.integer("max_position_embeddings"),
        "layernorm_epsilon": config.get("rms_norm_eps", default=epsilon),
        "activation": _ACTIVATIONS.get(activation, "swiglu"),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", default=False),
        "init_method_std": config.get("initializer_range", default=0.02) or 0.02,
        "attention_dropout": config.get("attention_dropout", default=0.0),
    }


def write_backbone(e: Experiment) -> Values:
    """The other way round."""
    model = e.model
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layernorm_epsilon,
        "hidden_act": {"geglu": "gelu"}.get(model.activation, "silu"),
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "attention_dropout": model.attention_dropout,
    }


def read_heads(config: ConfigJson, head_dim: int | None = None) -> Values:
    """Query heads, key and value heads and their width.

    Args:
        head_dim: the family's default. None: hidden_size over the heads.
    """
    heads = config.integer("num_attention_heads")
    width = config.get("head_dim", default=head_dim or config.integer("hidden_size") // max(heads, 1))
    return {
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads", default=heads),
        "kv_channels": width,
    }


def write_heads(e: Experiment) -> Values:
    """The other way round."""
    return {
        "num_attention_heads": e.model.num_attention_heads,
        "num_key_value_heads": e.model.num_query_groups,
        "head_dim": e.model.kv_channels,
    }


def window_from_layer(config: ConfigJson) -> tuple[int, list[bool]]:
    """The window that Qwen2's and Qwen3's last layers have, and which these are."""
    first = config.get("max_window_layers", default=28)
    window = config.get("sliding_window", default=4096)
    if not config.get("use_sliding_window", default=False):
        window = 0
    return window, [layer >= first for layer in range(config.layers())]


def read_window(config: ConfigJson, window: int, with_window: list[bool] | None = None) -> Values:
    """Which layers see how many tokens.

    Args:
        window: 0 is none.
        with_window: one entry a layer, where config.json has no layer_types. None: all.
    """
    layers = config.layers()
    given = config.get("layer_types", default=None)
    if given is not None:
        kinds = {"full_attention": False, "sliding_attention": True}
        if (
            not isinstance(given, list)
            or len(given) != layers
            or any(kind not in (*kinds,) for kind in given)
        ):
            config.refuse("layer_types", f"is no list of {layers} full_attention and sliding_attention")
            return {}
        with_window = [kinds[kind] for kind in given]
        if any(with_window) and not window:
            config.refuse("layer_types", "has layers with a window, and sliding_window is missing")
    if not window or with_window == [False] * layers:
        return {}
    if with_window is None or all(with_window):
        return {"sliding_window": window}
    return {"sliding_window": window, "window_attn_skip_freq": [int(has) for has in with_window]}


def write_layer_types(e: Experiment) -> Values:
    """The other way round, for families with layer_types."""
    windows = layers_with_window(e)
    return {
        "sliding_window": e.model.sliding_window,
        "layer_types": ["sliding_attention" if has else "full_attention" for has in windows],
    }


def write_window_from_layer(e: Experiment) -> Values:
    """The same for Qwen; older readers know max_window_layers only."""
    windows = layers_with_window(e)
    first = windows.index(True) if any(windows) else len(windows)
    return {**write_layer_types(e), "use_sliding_window": any(windows), "max_window_layers": first}
