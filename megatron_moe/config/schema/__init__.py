"""The experiment: every key that a YAML file may hold, its type, its default and what it does.

One pydantic model a section. Models are strict (no silent conversion), frozen, and refuse unknown keys.
``None`` as a default means "derived": `config.defaults.fill` replaces it by the value that the docstring
names, so that everything behind the loader sees concrete values. Rules that look at more than one key are in
`config.rules`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_moe.config.schema.data import Data, Prepare, Source, Tokenizer
from megatron_moe.config.schema.instruction import Instruction
from megatron_moe.config.schema.model import Model, MultiLatentAttention, RotaryScaling
from megatron_moe.config.schema.moe import MoE
from megatron_moe.config.schema.parallel import Parallel, Pipeline, Recompute
from megatron_moe.config.schema.run import Checkpoint, Cluster, Launch, Logging, Resilience, WandB
from megatron_moe.config.schema.section import InputPath, Section
from megatron_moe.config.schema.training import Lora, Optimizer, Training

__all__ = [
    "Checkpoint",
    "Cluster",
    "Data",
    "Experiment",
    "InputPath",
    "Instruction",
    "Launch",
    "Logging",
    "Lora",
    "MoE",
    "Model",
    "MultiLatentAttention",
    "Optimizer",
    "Parallel",
    "Pipeline",
    "Prepare",
    "Recompute",
    "Resilience",
    "RotaryScaling",
    "Section",
    "Source",
    "Tokenizer",
    "Training",
    "WandB",
]


class Experiment(Section):
    """One experiment: what `megatron-moe` commands take as CONFIG."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the run folder. Letters, digits, `.`, `_` and `-`."""
    model: Model
    moe: MoE | None = None
    parallel: Parallel = Field(default_factory=Parallel)
    pipeline: Pipeline = Field(default_factory=Pipeline)
    recompute: Recompute = Field(default_factory=Recompute)
    data: Data = Field(default_factory=Data)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    training: Training
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    logging: Logging = Field(default_factory=Logging)
    launch: Launch = Field(default_factory=Launch)
    resilience: Resilience = Field(default_factory=Resilience)
