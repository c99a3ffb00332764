"""A key of the schema that nothing reads would be silently ignored: there is none."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from key_reads import called, keys_of, reads

from megatron_moe.config.schema import Experiment, Training

PACKAGE = Path(__file__).parents[2] / "megatron_moe"
NO_USE = {"checking", "device_needs", "dump", "input_files", "keys", "loading", "resume"}
"""Files of config that pass on, print, compare or check keys, which is no use of them."""


def outside_config() -> list[str]:
    """The sources of all rooms but config."""
    files = (path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "config")
    return [path.read_text(encoding="utf-8") for path in files]


def called_from_outside(sources: list[str]) -> list[str]:
    """What config computes from an experiment because another room asks for it."""
    wanted: dict[str, set[str]] = {}
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_moe.config."):
                wanted.setdefault(node.module, set()).update(alias.name for alias in node.names)
    files = {name: PACKAGE / "config" / f"{name.rpartition('.')[2]}.py" for name in wanted}
    return [
        called(files[name].read_text(encoding="utf-8"), functions)
        for name, functions in wanted.items()
        if files[name].exists() and files[name].stem not in NO_USE
    ]


def unread() -> set[str]:
    """Keys that neither another room reads, nor a derived default of another key."""
    outside = outside_config()
    defaults = [
        (PACKAGE / "config" / f"{name}.py").read_text(encoding="utf-8")
        for name in ("defaults", "stage_counts")
    ]
    found = reads([*outside, *called_from_outside(outside)]) | reads(defaults)
    return {key for read, key in keys_of().items() if read not in found}


def test_every_key_is_read() -> None:
    assert unread() == set()


class PlantedTraining(Training):
    """The section with one more key."""

    planted: int = 0


class PlantedExperiment(Experiment):
    """The experiment with that section."""

    training: PlantedTraining


READS = {
    "through the experiment": "def f(e: PlantedExperiment): return e.training.planted",
    "through a name": "def f(e: PlantedExperiment):\n    t = e.training\n    return t.planted + 1",
    "one of two names": "def f(e: PlantedExperiment):\n    m, t = e.model, e.training\n    return t.planted",
    "as an argument": "def f(t: PlantedTraining | None = None):\n    if t: print(t.planted)",
    "of an object": "class A:\n    def f(self): return self.trainer.experiment.training.planted",
    "of an object that keeps the section": "class A:\n    def f(self): return self.training.planted",
    "in a lambda": "table = {'x': lambda e: e.training.planted}",
    "of a list": "def f(parts: list[PlantedTraining]): return [part.planted for part in parts]",
    "of a mapping": "def f(m: Mapping[str, PlantedTraining]):\n    for n, t in m.items(): yield n, t.planted",
    "of a result": "def g(e) -> PlantedTraining: ...\ndef f(e): return g(e).planted",
    "by a name of a list": "N = ('planted',)\ndef f(t: PlantedTraining): return [getattr(t, n) for n in N]",
    "by its name": "def f(t: PlantedTraining): return {n: getattr(t, n) for n in ('seed', 'planted')}",
}
OTHERS = {
    "nothing": "pass",
    "an object of another kind": "def f(layout: Layout): return layout.planted",
    "the same name in another section": "def f(e: PlantedExperiment): return e.model.planted",
    "a text": "def f(e: PlantedExperiment): return 'training.planted'",
    "an assignment": "def f(e: PlantedExperiment):\n    t = object()\n    t.planted = e.training.seed",
    "a name that is taken for another thing": "def f(t: PlantedTraining):\n    t = 3\n    return t.planted",
}
IMPORT = "from megatron_moe.config.schema import PlantedExperiment, PlantedTraining\n"


@pytest.mark.parametrize("source", READS.values(), ids=READS.keys())
def test_a_read_is_found(source: str) -> None:
    assert ("PlantedTraining", "planted") in reads([IMPORT + source], PlantedExperiment)


@pytest.mark.parametrize("source", OTHERS.values(), ids=OTHERS.keys())
def test_what_is_no_read_is_not_taken_for_one(source: str) -> None:
    assert ("PlantedTraining", "planted") not in reads([IMPORT + source], PlantedExperiment)


def test_a_key_that_is_added_and_not_read_would_be_found() -> None:
    """The whole package reads training's other keys, and not this one."""
    package = [source.replace("Training", "PlantedTraining") for source in outside_config()]
    package = [source.replace("Experiment", "PlantedExperiment") for source in package]
    missing = keys_of(PlantedExperiment).keys() - reads(package, PlantedExperiment)
    training = {field for section, field in missing if section == "PlantedTraining"}
    assert "planted" in training and not {"train_iters", "seq_length", "seed"} & training
