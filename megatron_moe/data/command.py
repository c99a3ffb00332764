"""`megatron-moe preprocess`: make token files, and say what came out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_moe.config.errors import InputError
from megatron_moe.data.documents import Unit
from megatron_moe.data.indexed import bin_path, idx_path
from megatron_moe.data.manifest import Manifest, manifest_path
from megatron_moe.data.preprocess import preprocess
from megatron_moe.data.staging import staging
from megatron_moe.data.tokenizer_training import train_sentencepiece
from megatron_moe.data.tokenizers import load_tokenizer


def run(
    inputs: Sequence[str],
    output: Path,
    *,
    kind: str = "sentencepiece",
    model: Path | None = None,
    vocab_size: int | None = None,
    json_key: str = "text",
    documents: Unit = "file",
    append_eod: bool = True,
    workers: int | None = None,
) -> Manifest:
    """Preprocess `inputs` into `<output>.bin`, `.idx` and `.json`, and print a summary.

    `kind` sentencepiece takes either `model`, a model file, or `vocab_size`, to train one that is saved as
    `<output>.model`.
    InputError for arguments that contradict each other, and as `preprocess` and `train_sentencepiece`.
    """
    if not output.name or output.is_dir():
        raise InputError(
            f"--output {output}: is a folder; give a prefix for the files, for example {output / 'corpus'}"
        )
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: at least one process has to work")
    _check_tokenizer(kind, model, vocab_size)
    make = functools.partial(
        preprocess,
        inputs,
        output,
        documents=documents,
        json_key=json_key,
        append_eod=append_eod,
        workers=workers,
    )
    if vocab_size is None:
        manifest = make(load_tokenizer(kind, model))
    else:
        model = output.with_name(output.name + ".model")
        with staging(model, wait=False) as folder:
            # An earlier model stays until the token files of the new one are there.
            trained = folder / model.name
            train_sentencepiece(inputs, vocab_size, trained, json_key)
            manifest = make(load_tokenizer(kind, trained))
            trained.replace(model)
    _print_summary(manifest, output, model)
    return manifest


def _check_tokenizer(kind: str, model: Path | None, vocab_size: int | None) -> None:
    if kind == "bytes" and (model is not None or vocab_size is not None):
        raise InputError(
            "--tokenizer bytes: has no model and always 257 ids; leave --tokenizer-model and --vocab-size out"
        )
    if kind == "sentencepiece" and (model is None) == (vocab_size is None):
        raise InputError(
            "--tokenizer sentencepiece: give either --tokenizer-model FILE, or --vocab-size N (for example "
            "1024) to train one on the inputs"
        )


def _print_summary(manifest: Manifest, output: Path, model: Path | None) -> None:
    assert manifest.text_bytes is not None
    console = Console(highlight=False, soft_wrap=True)
    left_out = f" ({manifest.empty_documents:,} empty ones left out)" if manifest.empty_documents else ""
    console.print(f"documents         {manifest.documents:,}{left_out}")
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
