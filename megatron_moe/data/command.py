"""`megatron-moe preprocess`: make token files, and say what came out."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from megatron_moe.config.errors import InputError
from megatron_moe.config.text_files import expand
from megatron_moe.data.documents import BadRecords, Unit
from megatron_moe.data.indexed import bin_path, idx_path
from megatron_moe.data.manifest import Manifest, manifest_path, read_manifest
from megatron_moe.data.preprocess import preprocess
from megatron_moe.data.staging import staging
from megatron_moe.data.tokenizer_training import Corpus, train_on
from megatron_moe.data.tokenizers import Tokenizer, load_tokenizer


def run(
    inputs: Sequence[str],
    output: Path,
    *,
    kind: str = "sentencepiece",
    model: Path | None = None,
    vocab_size: int | None = None,
    eod: str | None = None,
    pattern: str | None = None,
    json_key: str = "text",
    documents: Unit = "file",
    append_eod: bool = True,
    bad_records: BadRecords = "error",
    workers: int | None = None,
) -> Manifest:
    """Preprocess `inputs`, files, folders and globs, into `<output>.bin`, `.idx` and `.json`, and print a
    summary.

    `kind` sentencepiece takes either `model`, a model file, or `vocab_size`, to train one that is saved as
    `<output>.model`; huggingface and tiktoken take `model`. `eod` and `pattern`: as in data.tokenizer.
    InputError for arguments that contradict each other, and as `preprocess` and `train_on`.
    """
    _check_output(output)
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: at least one process has to work")
    _check_tokenizer(kind, model, {"--vocab-size": vocab_size, "--eod": eod, "--pattern": pattern})
    try:
        files = expand(inputs)
    except InputError as error:
        raise InputError(*(f"--input {problem}" for problem in error.problems)) from None
    make = functools.partial(
        preprocess,
        files,
        output,
        documents=documents,
        json_key=json_key,
        append_eod=append_eod,
        bad_records=bad_records,
        workers=workers,
    )
    if vocab_size is None:
        manifest = make(tokenizer=_loaded(kind, model, eod, pattern))
    else:
        model = output.with_name(output.name + ".model")
        with staging(model, wait=False) as folder:
            # An earlier model stays until the token files of the new one are there.
            trained = folder / model.name
            try:
                train_on([Corpus(files, json_key, bad_records)], vocab_size, trained)
            except InputError as error:
                raise InputError(str(error).replace("vocab_size: ", "--vocab-size ", 1)) from None
            manifest = make(tokenizer=load_tokenizer(kind, trained))
            trained.replace(model)
    _print_summary(manifest, output, model)
    return manifest


def _check_output(output: Path) -> None:
    if not output.name or output.is_dir():
        raise InputError(
            f"--output {output}: is a folder; give a prefix for the files, for example {output / 'corpus'}"
        )
    if output.suffix in (".bin", ".idx"):
        raise InputError(
            f"--output {output}: token files are named without {output.suffix}: {output.with_suffix('')}"
        )
    try:
        read_manifest(manifest_path(output))
    except InputError as error:
        raise InputError(
            f"--output {output}: would replace a file that is not the manifest of token files; choose "
            f"another name, or remove it ({error})"
        ) from None


def _check_tokenizer(kind: str, model: Path | None, options: Mapping[str, str | int | None]) -> None:
    used = {
        "sentencepiece": {"--vocab-size", "--eod"},
        "huggingface": {"--eod"},
        "tiktoken": {"--eod", "--pattern"},
    }
    unused = {name for name, value in options.items() if value is not None} - used.get(kind, set())
    if kind == "bytes" and (model is not None or unused):
        raise InputError(
            "--tokenizer bytes: has no model and always 257 ids; leave "
            f"{' and '.join(sorted(unused | ({'--tokenizer-model'} if model else set())))} out"
        )
    if unused:
        raise InputError(f"--tokenizer {kind}: does not use {' and '.join(sorted(unused))}; leave it out")
    trains = options["--vocab-size"] is not None
    if kind == "sentencepiece" and (model is None) != trains:
        raise InputError(
            "--tokenizer sentencepiece: give either --tokenizer-model FILE, or --vocab-size N (for example "
            "1024) to train one on the inputs"
        )
    if trains and options["--eod"] is not None:
        raise InputError("--eod: a tokenizer that is trained here has an end of its own; leave it out")
    if kind in ("huggingface", "tiktoken") and model is None:
        raise InputError(f"--tokenizer {kind}: give its file with --tokenizer-model FILE")


def _loaded(kind: str, model: Path | None, eod: str | None, pattern: str | None) -> Tokenizer:
    try:
        return load_tokenizer(kind, model, eod, pattern)
    except InputError as error:
        option = "" if str(error).startswith(("eod: ", "pattern: ")) else "tokenizer-model "
        raise InputError(f"--{option}{error}") from None


def _print_summary(manifest: Manifest, output: Path, model: Path | None) -> None:
    assert manifest.text_bytes is not None
    console = Console(highlight=False, soft_wrap=True)
    left_out = {"empty": manifest.empty_documents, "bad": manifest.skipped_records}
    counts = " and ".join(f"{count:,} {what}" for what, count in left_out.items() if count)
    console.print(f"documents         {manifest.documents:,}{f' ({counts} left out)' if counts else ''}")
    console.print(
        f"tokens            {manifest.tokens:,}, {manifest.text_bytes / manifest.tokens:.2f} bytes a token"
    )
    console.print(f"vocabulary        {manifest.vocab_size:,} ids")
    console.print(
        f"unigram entropy   {manifest.unigram_entropy_nats:.3f} nats a token (the loss without any context)"
    )
    console.print(
        f"token files       {bin_path(output)}, {idx_path(output).name}, {manifest_path(output).name}",
        markup=False,
    )
    if model is not None:
        console.print(f"tokenizer         {model}", markup=False)
