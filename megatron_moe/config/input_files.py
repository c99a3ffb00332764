"""Whether what an experiment reads is there. Not part of loading: a plan needs no data."""

from __future__ import annotations

import os

from megatron_moe.config.keys import in_tree, input_paths, leaves, schema_key, value_at
from megatron_moe.config.loading import Loaded
from megatron_moe.config.origin import Problem


def missing_files(loaded: Loaded) -> list[str]:
    """One line for each file that the experiment names and that cannot be read."""
    found = []
    for key in (key for known in input_paths() for key in in_tree(loaded.experiment, known)):
        value = value_at(loaded.experiment, key)
        for path in [value] if isinstance(value, str) else value or []:
            for file in (f"{path}.bin", f"{path}.idx") if key.endswith(".path") else (path,):
                if not os.path.isfile(file):
                    found.append(
                        Problem((key,), f"names {file}, and there is no such file", "name an existing file")
                    )
                elif not os.access(file, os.R_OK):
                    found.append(
                        Problem((key,), f"names {file}, which cannot be read", "change its permissions")
                    )
    values = {key: value for key, value in leaves(loaded.experiment) if schema_key(key) not in input_paths()}
    return [problem.render(values, loaded.provenance) for problem in found]
