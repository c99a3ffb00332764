"""What a user is told without a traceback: mistakes of the input (exit code 2), and what stopped a run from
outside (exit code 1)."""

from __future__ import annotations


class InputError(Exception):
    """The user's input is wrong: each of `problems` is one line that names the key or file and a value that
    would work."""

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type[InputError], tuple[str, ...]]:
        """Keep the single problems when the error travels between processes."""
        return type(self), tuple(self.problems)


class ConfigError(InputError):
    """The YAML file, or an override of it, is wrong."""


class RunError(Exception):
    """Something outside the program stopped a run, such as a full disk: one line that says what, and what to
    do."""
