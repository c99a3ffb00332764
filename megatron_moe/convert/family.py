"""What a model family is: the files in `convert/families/` each make one of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.correspondence import Group

Json = Mapping[str, Any]
"""What a config.json holds."""


class NotOfFamily(Exception):
    """A config.json or an experiment asks for what the family, or this program, cannot do; the message says
    what, and names the keys."""


@dataclass(frozen=True)
class Family:
    """One kind of model of Hugging Face.

    Attributes:
        name: as users say it, lower case.
        architectures: what stands under `architectures` in a config.json; the first is what is written.
        sections: config.json -> the sections `model` and `moe` of an experiment that computes the same,
            without `moe` where the model is dense. Raises NotOfFamily.
        config: an experiment -> config.json, without what only generation or a tokenizer needs. Raises
            NotOfFamily where this family has no word for something in the experiment.
        groups: every weight of a model, ours and theirs.
        without_weights: expressions that match names in their files which hold nothing trained, such as
            tables of frequencies.
    """

    name: str
    architectures: tuple[str, ...]
    sections: Callable[[Json], dict[str, Any]]
    config: Callable[[Experiment], dict[str, Any]]
    groups: Callable[[Experiment], Iterator[Group]]
    without_weights: tuple[str, ...] = ()
