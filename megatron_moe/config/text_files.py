"""Names of raw text: which types of file there are, and which files a folder or a glob stands for."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence

from megatron_moe.config.errors import InputError

SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""How the names of files end that can be read."""

_SHOWN = ".txt, .jsonl (both also with .gz or .zst behind it) or .parquet"


def suffix_of(path: str) -> str:
    """The ending of SUFFIXES that `path` has, in lower case; empty if it has none."""
    name = path.lower()
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")


def unknown_type(path: str) -> str:
    """The mistake of a file whose name says no type."""
    return f"{path}: unknown type of input; its name has to end in {_SHOWN}"


def expand(inputs: Sequence[str]) -> list[str]:
    """The files that `inputs` stand for, in this order: files as they are, folders and globs as the files of
    known types in them, sorted by path.

    A folder is taken with all folders below it; what is hidden (its name begins with a dot) is left out. A
    name that exists is no glob, whatever characters it has. InputError, with one line for each, for folders
    and globs without a file, and for a file that two entries stand for where one of them is a folder or glob.
    """
    found = [(entry, files_of(entry)) for entry in inputs]
    problems = [nothing_in(entry) for entry, files in found if not files] + named_twice(inputs)
    if problems:
        raise InputError(*problems)
    return [path for _, files in found for path in files]


def named_twice(inputs: Sequence[str]) -> list[str]:
    """One mistake for each pair of entries, one of them a folder or a glob, that stand for the same path."""
    owners: dict[str, str] = {}
    problems: dict[tuple[str, str], str] = {}
    for entry in inputs:
        for path in files_of(entry):
            other = owners.setdefault(os.path.abspath(path), entry)
            if other != entry:
                text = f"{path}: both {other} and {entry} stand for it; leave one of them out"
                problems.setdefault((other, entry), text)
    return list(problems.values())


def files_of(entry: str) -> list[str]:
    """The files that one input stands for; empty for a folder or a glob without any. InputError for a folder
    that cannot be read."""
    if not os.path.isdir(entry) and not is_glob(entry):
        return [entry]
    return sorted(path for path in _matched(entry) if suffix_of(path) and not os.path.isdir(path))


def nothing_in(entry: str) -> str:
    """The mistake of a folder or a glob that stands for no file."""
    remedy = f"names have to end in {_SHOWN}"
    if os.path.isdir(entry):
        return f"{entry}: no file in this folder, or below it, has a known type; {remedy}"
    others = _matched(entry)
    found = f"no file of a known type, only others such as {min(others)}" if others else "no file"
    return f"{entry}: this glob matches {found}; {remedy}"


def is_glob(entry: str) -> bool:
    """Whether an input is a pattern and not the name of something that exists, or could."""
    return glob.has_magic(entry) and not os.path.lexists(entry)


def _matched(entry: str) -> set[str]:
    """What a folder or a pattern stands for. As glob.glob, but links lead round in no circle, and a folder
    that cannot be read is not passed over: InputError."""
    folder, pattern = (entry, "**") if os.path.isdir(entry) else _literal_beginning(entry)
    return set(_below(folder, [part for part in pattern.split("/") if part]))


def _below(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """What the parts of a pattern stand for in a folder; "" is the working directory."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        for inner in _folders(folder, frozenset()):
            yield from _below(inner, rest or ["*"])
        return
    for name in _names(folder) if glob.has_magic(part) else [part]:
        path = os.path.join(folder, name)
        if not fnmatch.fnmatchcase(name, part) or (name.startswith(".") and not part.startswith(".")):
            continue
        if rest and os.path.isdir(path):
            yield from _below(path, rest)
        elif not rest and os.path.lexists(path):
            yield path


def _folders(folder: str, above: frozenset[str]) -> Iterator[str]:
    """A folder and all below it, links to folders included; not what is hidden."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it lies in
        return
    yield folder
    for name in _names(folder):
        path = os.path.join(folder, name)
        if not name.startswith(".") and os.path.isdir(path):
            yield from _folders(path, above | {real})


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder or ".")
    except OSError as error:
        raise InputError(f"{folder or '.'}: cannot read the folder: {error.strerror}") from None


def _literal_beginning(pattern: str) -> tuple[str, str]:
    """The first parts of a pattern that exist as they are, in /data[1]/*.txt the folder, and the others."""
    head, tail = "", pattern
    while tail:
        part, slash, rest = tail.partition("/")
        if part and not os.path.lexists(head + part):
            break
        head, tail = head + part + slash, rest
    return head, tail
