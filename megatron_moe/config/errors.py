"""What a user is told without a traceback: mistakes of the input (exit code 2), and what stopped a run from
outside (exit code 1)."""

from __future__ import annotations

import errno
import re

_OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


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


def not_written(what: str, error: OSError) -> InputError | RunError:
    """The error of a file that could not be written: for a full or broken disk a RunError, else, as for a
    folder where nobody may write, the user's mistake. `what`: the file, and what it was to be."""
    kind = RunError if is_outside(error) else InputError
    return kind(f"{what}: {error.strerror}")


def is_outside(error: BaseException) -> bool:
    """Whether a full or broken disk is what went wrong."""
    return isinstance(error, OSError) and error.errno in _OUTSIDE


def one_line(problem: str) -> str:
    """A mistake as it is printed: names of files and keys may hold newlines, or codes that terminals obey."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), problem)
