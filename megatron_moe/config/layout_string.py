"""Megatron's layout string: which layers each pipeline stage holds, in one line of text.

    Et*3|(tt|)*29,m|L

`|` stands between stages; E is the embedding, t a transformer layer, m a multi-token-prediction layer, L the
loss. `*n` repeats the letter or
the parentheses before it, and commas are only there for the eye. Stages are in the order in which a token
passes them, so that there are PP x VPP of them.
"""

from __future__ import annotations

import re

from megatron_moe.config.schema import Experiment

_LONGEST = 100_000
"""Letters of a string with its repeats written out: far more than any model has layers."""

AUTO = "auto"
"""In the place of a string or a list: the planner finds it."""

_PART = re.compile(r"(?P<part>\([^()]*\)|[^()*])(?:\*(?P<times>[0-9]+))?")

_MEANING = "E (embedding), t (layer), m (multi-token prediction), L (loss), | (next stage)"


class LayoutMistake(ValueError):
    """A text that is no layout string. `reason` continues "the string ..."; `remedy` says what would work."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


def layers_of(text: str) -> list[int]:
    """Layers of each stage of a layout string. Raises LayoutMistake."""
    stages = stages_of(text)
    joined = "".join(stages)
    for letter, name, place in (("E", "embedding", "first"), ("L", "loss", "last")):
        if joined.count(letter) != 1:
            times = joined.count(letter) or "no"
            raise LayoutMistake(f"has {times} {letter}", f"write one {letter}, the {name}, {place} of all")
    if not joined.startswith("E"):
        stage = next(number for number, stage in enumerate(stages, 1) if "E" in stage)
        raise LayoutMistake(
            f"has E in stage {stage}, where it is not first", "begin the first stage with E, the embedding"
        )
    if not joined.endswith("L"):
        stage = next(number for number, stage in enumerate(stages, 1) if "L" in stage)
        raise LayoutMistake(
            f"has L in stage {stage}, where it is not last", "end the last stage with L, the loss"
        )
    if "m" in joined and "t" in joined[joined.index("m") :]:
        stage = next(number for number, stage in enumerate(stages, 1) if "m" in stage)
        raise LayoutMistake(
            f"has m in stage {stage}, before a layer", "put m, multi-token prediction, behind the last t"
        )
    if len(with_m := [number for number, stage in enumerate(stages, 1) if "m" in stage]) > 1:
        raise LayoutMistake(
            f"has m in stages {' and '.join(map(str, with_m))}",
            "put all multi-token prediction into one stage",
        )
    return [stage.count("t") for stage in stages]


def mtp_of(text: str) -> tuple[int, int]:
    """Multi-token-prediction layers of a right layout string, and the stage, from 0, that holds them."""
    counts = [stage.count("m") for stage in stages_of(text)]
    return sum(counts), counts.index(max(counts))


def stages_of(text: str) -> list[str]:
    """The letters of each stage, repeats written out. Raises LayoutMistake."""
    letters = _written_out(text.replace(",", ""))
    for letter in letters:
        if letter not in "EtmL|":
            advice = f"use t*{letter} for repeats" if letter.isdigit() else f"use {_MEANING}"
            raise LayoutMistake(f'has "{letter}", which is no kind of layer', advice)
    return letters.split("|")


def _written_out(text: str) -> str:
    result, position = "", 0
    while position < len(text):
        found = _PART.match(text, position)
        if found is None:
            raise _unreadable(text, position)
        part, times = found["part"], found["times"]
        if part.startswith("("):
            if times is None or part == "()":
                raise LayoutMistake(f"repeats nothing with {part}", "write parentheses as (tt|)*2")
            part = _written_out(part[1:-1])
        too_long = len(times or "") > len(str(_LONGEST))
        repeats = 1 if too_long else int(times or 1)
        if too_long or len(result) + len(part) * repeats > _LONGEST:
            raise LayoutMistake(f"has more than {_LONGEST:,} layers and stages", "repeat less")
        result += part * repeats
        position = found.end()
    return result


def _unreadable(text: str, position: int) -> LayoutMistake:
    here = f"at {text[position : position + 12]!r}"
    if text[position] == "*":
        return LayoutMistake(
            f"has a * {here} that is not between something to repeat and a number", "write t*3 or (tt|)*3"
        )
    if text[position] == "(" and re.match(r"\([^()]*\(", text[position:]):
        return LayoutMistake(
            f"has parentheses inside parentheses {here}, which Megatron cannot read",
            "write the inner ones out",
        )
    return LayoutMistake(f"has unbalanced parentheses {here}", "close each ( with a )")


def layers_per_stage(experiment: Experiment) -> list[int]:
    """Layers of each stage of a filled experiment, where a string has become a list, and which the planner
    has nothing to place in."""
    layers = experiment.pipeline.layers_per_stage
    assert isinstance(layers, list), "this looks at filled and placed experiments only"
    return layers


def layers_are_placed(experiment: Experiment) -> bool:
    """Whether the planner is to say which layers each stage holds."""
    return experiment.pipeline.layers_per_stage == AUTO
