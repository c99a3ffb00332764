"""Rules about what is installed."""

from __future__ import annotations

import importlib.metadata
import re

from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import Problems
from megatron_moe.config.schema import Experiment

MEGATRON_CORE_VERSIONS = ((0, 16, 1), (0, 20, 0))
"""The first version that is supported, and the first one that is not."""


def megatron_core_supported(e: Experiment) -> Problems:
    """The engine leans on internals of Megatron-Core that were looked at in these versions only."""
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    first, beyond = MEGATRON_CORE_VERSIONS
    if found is None or not first <= tuple(int(part or 0) for part in found.groups()) < beyond:
        text = f"cannot be trained with megatron-core {version}, the installed version"
        yield Problem(("model",), text, "pip install 'megatron-core>=0.16.1,<0.20'")
