"""A config.json, read key by key, so that nothing in it is passed over in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from megatron_moe.convert.family import Json, NotOfFamily

_T = TypeVar("_T")
_MOST_LAYERS = 10_000
"""As the schema allows them."""

_ABOUT_THE_FILE = """
    _name_or_path _commit_hash architectures auto_map dtype model_type tokenizer_class torch_dtype
    transformers_version transformers.js_config is_llama_config unsloth_fixed unsloth_version custom_generate
"""
_OF_PROGRAMS = """
    _attn_implementation attn_implementation chunk_size_feed_forward ep_size gradient_checkpointing
    output_attentions output_hidden_states output_router_logits pretraining_tp return_dict
    tie_last_hidden_states torchscript use_bfloat16 use_cache use_flash_attn use_return_dict
"""
_OF_GENERATION = """
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores prefix remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens temperature tf_legacy_loss top_k top_p typical_p
    finetuning_task id2label label2id problem_type task_specific_params
"""
_OF_STORAGE = "quantization_config"
"""FP8 is undone when the files are read, and other kinds are refused there."""
HARMLESS = frozenset(" ".join((_ABOUT_THE_FILE, _OF_PROGRAMS, _OF_GENERATION, _OF_STORAGE)).split())
"""Keys that change nothing of what a model computes."""


class ConfigJson:
    """Hands out the values of a config.json, and knows in the end which of them nobody asked for.

    Args:
        config: what the file holds. A key whose value is null counts as left out, as it does for the library.
    """

    def __init__(self, config: Json) -> None:
        self._config = {key: value for key, value in config.items() if value is not None}
        self._nulls = set(config) - set(self._config)
        self._asked = set(HARMLESS)
        self._problems: list[str] = []

    def get(self, *spellings: str, default: _T) -> _T:
        """The value under the first of these keys that is there. Notes a problem where it is of another kind
        than the default; a default of None takes any kind."""
        self._asked.update(spellings)
        for key in spellings:
            if key in self._config:
                value: Any = self._config[key]
                if _is_like(value, default):
                    return value
                self.refuse(key, f"is no {_KINDS[type(default)]}")
                return default
        return default

    def is_null(self, key: str) -> bool:
        """Whether the key is there with the value null, for families in which that is not its default."""
        return key in self._nulls

    def integer(self, *spellings: str) -> int:
        """A number that every such file has. Raises NotOfFamily where it is missing."""
        if not any(key in self._config for key in spellings):
            self._stop(f"{spellings[0]} is missing")
        return self.get(*spellings, default=0)

    def layers(self) -> int:
        """num_hidden_layers. Raises NotOfFamily where lists of as many would fill the memory."""
        key = "num_hidden_layers"
        count = self.integer(key)
        if count > _MOST_LAYERS:
            self._stop(f"{key}: {count} is more than {_MOST_LAYERS:,}")
        return count

    def require(self, key: str, wanted: object, why: str, default: object = None) -> None:
        """Note a problem unless the key has this value. Its default is `wanted` unless given."""
        value = self.get(key, default=None)
        value = default if value is None else value
        if value is not None and value != wanted:
            self.refuse(key, why)

    def refuse(self, key: str, why: str) -> None:
        """Note that the value of this key cannot be computed."""
        value = self._config.get(key)
        self._problems.append(f"{key}: {value!r} {why}" if value is not None else f"{key} {why}")

    def finish(self) -> None:
        """Raises NotOfFamily with all problems, among them keys that nobody has asked for: what they change
        is not known."""
        unknown = sorted(set(self._config) - self._asked)
        self._problems += [f"{key}: {self._config[key]!r} is not known here" for key in unknown]
        if self._problems:
            raise self._refusal()

    def _stop(self, problem: str) -> NoReturn:
        self._problems.append(problem)
        raise self._refusal()

    def _refusal(self) -> NotOfFamily:
        # A key may have been asked for twice.
        return NotOfFamily("\n".join(dict.fromkeys(self._problems)))


_KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    list: "list",
    dict: "section",
}


def _is_like(value: object, default: object) -> bool:
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, type(default))
