"""Training and validation samples: Megatron-Core's `GPTDataset` over the token files, or random ones.

Each dataset is built for exactly one epoch; `data.batches` makes epochs of it, so that the order of samples
does not depend on the length of the run. The sample indices are kept beside the data, made once and whole.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.config.sources import PARTS, sources_of, split_of, weights_of
from megatron_moe.data.blend import Blend, Part
from megatron_moe.data.indexed import bin_path, idx_path
from megatron_moe.data.instruction.datasets import build_samples, description
from megatron_moe.data.mock import MockDataset
from megatron_moe.data.parts import check_parts, part_bounds, parts_read
from megatron_moe.data.prepare import Prepared, PreparedSource
from megatron_moe.data.samples import Samples, apart_at_ends
from megatron_moe.data.staging import staging
from megatron_moe.data.tokenizers import Tokenizer

_SPLITS = {"training": Split.train, "validation": Split.valid}


@dataclass(frozen=True)
class Datasets:
    """What a run reads."""

    train: Samples
    valid: Samples | None
    """None if training.eval_interval is not set."""
    said: tuple[str, ...] = ()
    """What is to be said of them when a run begins, a line each."""


def build_datasets(experiment: Experiment, prepared: Prepared) -> Datasets:
    """The training samples and, if the experiment evaluates, the validation samples.

    Under torch.distributed rank 0 has to come here first, the others after it: Megatron-Core builds indices
    only there.
    InputError if a part that is read of a source holds less than one sample of training.seq_length.
    """
    needed = ["training"] if experiment.training.eval_interval is None else ["training", "validation"]
    if prepared.instruction is not None:
        assert prepared.tokenizer is not None
        of_records = build_samples(experiment, prepared.instruction, prepared.tokenizer)
        said = tuple(description(part, of_part) for part, of_part in of_records.items())
        return Datasets(of_records["training"], of_records.get("validation"), said)
    if experiment.data.kind == "mock":
        samples: dict[str, Samples] = {part: _mock(experiment, prepared, part) for part in needed}
    elif experiment.data.blend is None:
        (of_parts,) = (_parts_of(experiment, prepared, source) for source in prepared.sources)
        samples = of_parts
    else:
        of_sources = {source.name: _parts_of(experiment, prepared, source) for source in prepared.sources}
        samples = {part: _blend(experiment, of_sources, part) for part in needed}
    return Datasets(samples["training"], samples.get("validation"))


def _mock(experiment: Experiment, prepared: Prepared, part: str) -> MockDataset:
    training = experiment.training
    return MockDataset(prepared.vocab_size, training.seq_length, training.seed, _SPLITS[part].value)


def _parts_of(experiment: Experiment, prepared: Prepared, source: PreparedSource) -> dict[str, Samples]:
    """The samples of those parts of a source that are read."""
    assert prepared.tokenizer is not None
    with warnings.catch_warnings():
        # 0.19 says so for each line that it would log, where torch.distributed is not set up.
        warnings.filterwarnings("ignore", "Could not determine rank")
        tokens = IndexedDataset(str(source.prefix))
        check_parts(experiment, source.name, tokens.sequence_lengths)
        return {
            part: apart_at_ends(
                _gpt_dataset(experiment, prepared.tokenizer, source, tokens, _SPLITS[part]),
                experiment.data,
                prepared.tokenizer.eod,
            )
            for part in parts_read(experiment, source.name)
        }


def _blend(experiment: Experiment, of_sources: Mapping[str, Mapping[str, Samples]], part: str) -> Blend:
    """The samples of one part of all sources, mixed by their weights."""
    parts = []
    for name, source in sources_of(experiment.data).items():
        if part in of_sources[name]:
            samples = of_sources[name][part]
            weight = weights_of(experiment.data, source)[PARTS.index(part)]
            in_proportion = len(samples) * (1.0 if source.epochs is None else source.epochs)
            parts.append(Part(name, samples, in_proportion if weight is None else weight))
    return Blend(parts, tell_source=part == "validation")


class _TokenizerFacts:
    """All that `GPTDataset` asks of a tokenizer."""

    pad = -1
    """An id that no text has: Megatron-Core takes the loss from every label that is the padding id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eod = tokenizer.eod
        self.vocab_size = tokenizer.vocab_size
        self.unique_identifiers = {"sha256": tokenizer.sha256}


def _gpt_dataset(
    experiment: Experiment, tokenizer: Tokenizer, source: PreparedSource, tokens: IndexedDataset, split: Split
) -> GPTDataset:
    weights = split_of(experiment.data, sources_of(experiment.data)[source.name])
    cache = source.index_cache / _index_name(experiment, tokenizer, source, weights, split)
    begin, end = part_bounds(weights, len(tokens))[split.value]
    documents = np.arange(begin, end, dtype=np.int32)
    make = functools.partial(GPTDataset, tokens, str(source.prefix), documents, None, split)
    config = functools.partial(_config, experiment, tokenizer, source, weights)
    if not cache.is_dir():
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            raise RuntimeError(f"{cache}: rank 0 must build the sample index before other ranks read it")
        with staging(cache, wait=True) as folder:
            if not cache.is_dir():
                make(config(folder / "ready"))
                (folder / "ready").rename(cache)
    for path in cache.glob("*.npy"):
        # Megatron-Core would unpickle an array of objects; this only reads what is plain numbers, and whole.
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError:
            raise InputError(
                f"{path}: a damaged sample index; remove the folder {cache}, and it is made again"
            ) from None
    return make(config(cache))


def _config(
    experiment: Experiment, tokenizer: Tokenizer, source: PreparedSource, weights: list[float], cache: Path
) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=experiment.training.seed,
        sequence_length=experiment.training.seq_length,
        blend=([str(source.prefix)], None),
        split=",".join(f"{Decimal(weight):f}" for weight in weights),  # its parser knows no exponents
        path_to_cache=str(cache),
        tokenizer=_TokenizerFacts(tokenizer),
        # What these do costs a mask of s x s a sample; `data.samples` does it without.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _index_name(
    experiment: Experiment, tokenizer: Tokenizer, source: PreparedSource, weights: list[float], split: Split
) -> str:
    """Names the index by everything that it depends on."""
    stats = [path(source.prefix).stat() for path in (bin_path, idx_path)]
    depends_on = [
        str(source.prefix.resolve()),
        [(stat.st_size, stat.st_mtime_ns) for stat in stats],
        experiment.training.seed,
        experiment.training.seq_length,
        weights,
        tokenizer.sha256,
        version("megatron-core"),
    ]
    return f"{split.name}-{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:12]}"
