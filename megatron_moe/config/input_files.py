"""Whether what an experiment reads is there. Not part of loading: a plan needs no data."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence

from megatron_moe.config.errors import InputError
from megatron_moe.config.huggingface_files import end_of_document
from megatron_moe.config.keys import in_tree, input_paths, leaves, schema_key, value_at
from megatron_moe.config.loading import Loaded
from megatron_moe.config.origin import Problem
from megatron_moe.config.schema import Data, Tokenizer
from megatron_moe.config.sources import texts_of
from megatron_moe.config.text_files import files_of, named_twice, nothing_in, suffix_of, unknown_type

_PACKAGES = {
    ".parquet": ("pyarrow", "parquet"),
    ".zst": ("zstandard", "zstd"),
    "huggingface": ("tokenizers", "huggingface"),
    "tiktoken": ("tiktoken", "tiktoken"),
}
"""What reads a type of file, or is a kind of tokenizer: the package and the extra that brings it."""
_RECORDS = ("data.instruction.train", "data.instruction.validation")


def missing_files(loaded: Loaded) -> list[str]:
    """One line for each file, or package to read it with, that the experiment needs and that is not there."""
    found = []
    for key in (key for known in input_paths() for key in in_tree(loaded.experiment, known)):
        value = value_at(loaded.experiment, key)
        for path in [value] if isinstance(value, str) else value or []:
            if key.endswith(".input"):
                found += list(_of_text(key, path))
            elif key in _RECORDS:
                found += list(_of_text(key, path, records=True))
            elif key == "checkpoint.initialize_from":
                # Whether there is a model in it is seen when the run begins.
                if not os.path.isdir(path):
                    text = f"names {path}, and there is no such folder"
                    found.append(Problem((key,), text, "name a folder with a model"))
            elif key.endswith(".path"):
                found += [problem for end in (".bin", ".idx") for problem in _of_file(key, path + end)]
            elif not (os.path.isdir(path) and loaded.experiment.data.tokenizer.kind == "huggingface"):
                found += list(_of_file(key, path))
    for key, inputs in _inputs_of(loaded.experiment.data).items():
        found += _named_twice(key, inputs)
    found += _no_end_of_document(loaded.experiment.data.tokenizer)
    found += _missing_packages(loaded.experiment.data)
    values = {key: value for key, value in leaves(loaded.experiment) if schema_key(key) not in input_paths()}
    return [problem.render(values, loaded.provenance) for problem in found]


def _inputs_of(data: Data) -> dict[str, list[str]]:
    """The files, folders and globs of texts and of records, by their key."""
    found = {f"{section}.input": prepare.input for section, prepare in texts_of(data).items()}
    if data.instruction is not None:
        found[_RECORDS[0]] = data.instruction.train
        found[_RECORDS[1]] = data.instruction.validation or []
    return found


def _of_text(key: str, entry: str, records: bool = False) -> Iterator[Problem]:
    """What is wrong with an entry that names texts, or `records`, which are no plain text."""
    try:
        files = files_of(entry)
    except InputError as error:
        yield Problem((key,), f"names {error}", "change its permissions")
        return
    if not files:
        text, _, remedy = nothing_in(entry).rpartition("; ")
        yield Problem((key,), f"names {text}", remedy)
    for file in files:
        if records and suffix_of(file).startswith(".txt"):
            yield Problem(
                (key,), f"names {file}, which is text without records", "name jsonl or parquet files"
            )
        elif suffix_of(file):
            yield from _of_file(key, file)
        else:
            text, _, remedy = unknown_type(file).rpartition("; ")
            yield Problem((key,), f"names {text}", remedy)


def _of_file(key: str, file: str) -> Iterator[Problem]:
    if not os.path.isfile(file):
        yield Problem((key,), f"names {file}, and there is no such file", "name an existing file")
    elif not os.access(file, os.R_OK):
        yield Problem((key,), f"names {file}, which cannot be read", "change its permissions")


def _named_twice(key: str, inputs: Sequence[str]) -> Iterator[Problem]:
    for line in named_twice(inputs):
        text, _, remedy = line.rpartition("; ")
        yield Problem((key,), f"names {text}", remedy)


def _no_end_of_document(tokenizer: Tokenizer) -> Iterator[Problem]:
    if tokenizer.kind != "huggingface" or tokenizer.model is None or not os.path.exists(tokenizer.model):
        return
    try:
        end_of_document(tokenizer.model, tokenizer.eod)
    except InputError as error:
        problem = str(error)
        if not problem.startswith("eod: "):
            yield Problem(("data.tokenizer.model",), f"does not work: {problem}", "name another file")
            return
        text, _, remedy = problem.removeprefix("eod: ").rpartition("; ")
        does_not = "" if tokenizer.eod is None else "does not work: "
        yield Problem(("data.tokenizer.eod",), does_not + text, remedy)


def _missing_packages(data: Data) -> Iterator[Problem]:
    wanted: dict[str, str] = {data.tokenizer.kind: "data.tokenizer.kind"}
    for key, inputs in _inputs_of(data).items():
        for file in (file for entry in inputs for file in files_of(entry)):
            wanted.setdefault(f".{file.lower().rpartition('.')[2]}", key)
    for what, key in wanted.items():
        package, extra = _PACKAGES.get(what, ("", ""))
        if package and importlib.util.find_spec(package) is None:
            text = f"needs the package {package} ({what}), which is not installed here"
            yield Problem((key,), text, f"pip install 'megatron-moe[{extra}]'")
