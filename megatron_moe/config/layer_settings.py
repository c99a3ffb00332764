"""The settings of a MoE layer that is used alone, by the keys, rules and errors of the section `moe`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from megatron_moe.config.checking import check
from megatron_moe.config.defaults import attempt
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.keys import leaves
from megatron_moe.config.origin import Origin
from megatron_moe.config.rules import violations
from megatron_moe.config.schema import MoE

SHORT_NAMES = {
    "num_experts": "num_moe_experts",
    "topk": "moe_router_topk",
    "ffn_hidden_size": "moe_ffn_hidden_size",
    "activation": "moe_expert_activation",
}
"""What a caller may write for the longer key."""

OF_MODELS = {
    "moe_layer_freq": "it says which layers of a model are MoE",
    "moe_first_k_dense_layers": "it says which layers of a model are MoE",
    "moe_permute_fusion": "it needs Megatron-Core's own layer",
    "moe_flex_dispatcher_backend": "it needs Megatron-Core's own layer",
    "overlap_moe_expert_parallel_comm": "it needs Megatron-Core's schedule",
}
"""Keys of the section that are not about one layer, and why."""


def moe_settings(
    hidden_size: int, given: Mapping[str, Any], ranks: int = 1, of_callers_own: tuple[str, ...] = ()
) -> MoE:
    """The section, every derived default set.

    Args:
        hidden_size: h.
        given: values by key, or by short name.
        ranks: of the expert-parallel group.
        of_callers_own: keys that the caller's own experts make meaningless.

    Raises ConfigError with a line for each mistake.
    """
    values = {SHORT_NAMES.get(name, name): value for name, value in given.items() if value is not None}
    twice = [name for name, key in SHORT_NAMES.items() if given.get(name) is not None and key in given]
    problems = [f"{name}: is the same as {SHORT_NAMES[name]}; give one of the two" for name in twice]
    problems += [
        f"{key}: has no effect on a layer alone: {reason}; leave it out"
        for key, reason in OF_MODELS.items()
        if key in values
    ]
    problems += [
        f"{key}: has no effect on experts that `expert` builds; leave it out, or leave that out"
        for key in of_callers_own
        if key in values
    ]
    if "num_moe_experts" not in values:
        problems.append("num_experts: is missing; say how many experts there are, for example 8")
        values["num_moe_experts"] = max(8, ranks)
    if values.get("moe_token_dispatcher_type") == "flex":
        problems.append("moe_token_dispatcher_type: flex needs Megatron-Core's own layer; use auto")
        del values["moe_token_dispatcher_type"]
    checked = check(_document(hidden_size, values, ranks), {}, "")
    filled = attempt(checked.experiment, partial=bool(checked.broken))
    found = filled.problems + violations(filled.experiment, filled.partial)
    all_values = dict(leaves(filled.experiment))
    origins = {f"moe.{key}": Origin("override") for key in values}
    lines = checked.problems + [
        problem.render(all_values, origins) for problem in found if problem.keys[0].startswith("moe.")
    ]
    written = {key: name for name, key in SHORT_NAMES.items() if given.get(name) is not None}
    problems += [_as_written(_plain(line), written) for line in lines]
    if problems:
        raise ConfigError(*problems)
    moe = filled.experiment.moe
    assert moe is not None
    return moe


def _document(hidden_size: int, moe: dict[str, Any], ranks: int) -> dict[str, Any]:
    """An experiment with one such layer."""
    parallel = {"expert_model_parallel_size": ranks, "data_parallel_size": ranks}
    return {
        "name": "layer",
        "model": {
            "num_layers": 1,
            "hidden_size": hidden_size,
            "num_attention_heads": 1,
            "vocab_size": 1,
            "position_embedding_type": "none",
        },
        "moe": moe,
        "parallel": parallel,
        "training": {"train_iters": 1, "global_batch_size": ranks, "seq_length": 1},
    }


def _plain(line: str) -> str:
    """The line, without what stands for a file."""
    text = line.removeprefix("override ").replace(", override)", ")")
    text = text.replace("parallel.expert_model_parallel_size", "the ranks of process_group")
    text = re.sub(r"or expert_model_parallel_size (.*)$", r"or a group of \1 ranks", text)
    text = re.sub(r"^(\S+): unknown key; moe has (.*)$", _with_nearest, text.replace("moe.", ""))
    return text.replace("moe.", "").replace("model.hidden_size", "hidden_size")


def _with_nearest(unknown: re.Match[str]) -> str:
    """Of all keys those that the unknown one may have been meant as."""
    given = unknown[1].removeprefix("moe_")
    known = {key.removeprefix("moe_"): key for key in unknown[2].split(", ")}
    nearest = difflib.get_close_matches(given, known, n=3, cutoff=0.0)
    return f"{unknown[1]}: unknown key; the nearest are {', '.join(known[name] for name in nearest)}"


def _as_written(line: str, written: Mapping[str, str]) -> str:
    """The line, with keys by the names that the caller gave them."""
    for key, name in written.items():
        line = re.sub(rf"\b{key}\b", name, line)
    return line
