"""Training and validation samples: Megatron-Core's `GPTDataset` over the token files, or random ones.

Each dataset is built for exactly one epoch; `data.batches` makes epochs of it, so that the order of samples
does not depend on the length of the run. The sample indices are kept beside the data, made once and whole.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from dataclasses import dataclass
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Experiment
from megatron_moe.data.batches import Samples
from megatron_moe.data.indexed import bin_path, idx_path
from megatron_moe.data.mock import MockDataset
from megatron_moe.data.parts import check_parts, part_bounds
from megatron_moe.data.prepare import Prepared
from megatron_moe.data.staging import staging
from megatron_moe.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Datasets:
    """What a run reads."""

    train: Samples
    valid: Samples | None
    """None if training.eval_interval is not set."""


def build_datasets(experiment: Experiment, prepared: Prepared) -> Datasets:
    """The training samples and, if the experiment evaluates, the validation samples.

    Under torch.distributed rank 0 has to come here first, the others after it: Megatron-Core builds indices
    only there.
    InputError if a part of data.split holds less than one sample of training.seq_length.
    """
    needed = [Split.train] if experiment.training.eval_interval is None else [Split.train, Split.valid]
    if prepared.prefix is None:
        make = functools.partial(
            MockDataset, prepared.vocab_size, experiment.training.seq_length, experiment.training.seed
        )
        parts: dict[Split, Samples] = {split: make(split.value) for split in needed}
    else:
        with warnings.catch_warnings():
            # 0.19 says so for each line that it would log, where torch.distributed is not set up.
            warnings.filterwarnings("ignore", "Could not determine rank")
            tokens = IndexedDataset(str(prepared.prefix))
            check_parts(experiment, tokens.sequence_lengths)
            parts = {split: _gpt_dataset(experiment, prepared, tokens, split) for split in needed}
    return Datasets(parts[Split.train], parts.get(Split.valid))


class _TokenizerFacts:
    """All that `GPTDataset` asks of a tokenizer."""

    pad = -1
    """An id that no text has: Megatron-Core takes the loss from every label that is the padding id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eod = tokenizer.eod
        self.vocab_size = tokenizer.vocab_size
        self.unique_identifiers = {"sha256": tokenizer.sha256}


def _gpt_dataset(
    experiment: Experiment, prepared: Prepared, tokens: IndexedDataset, split: Split
) -> GPTDataset:
    assert prepared.index_cache is not None
    cache = prepared.index_cache / _index_name(experiment, prepared, split)
    documents = _documents(experiment, prepared, tokens, split)
    make = functools.partial(GPTDataset, tokens, str(prepared.prefix), documents, None, split)
    if not cache.is_dir():
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            raise RuntimeError(f"{cache}: rank 0 must build the sample index before other ranks read it")
        with staging(cache, wait=True) as folder:
            if not cache.is_dir():
                make(_config(experiment, prepared, folder / "ready"))
                (folder / "ready").rename(cache)
    for path in cache.glob("*.npy"):
        # Megatron-Core would unpickle an array of objects; this only reads what is plain numbers, and whole.
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError:
            raise InputError(
                f"{path}: a damaged sample index; remove the folder {cache}, and it is made again"
            ) from None
    return make(_config(experiment, prepared, cache))


def _config(experiment: Experiment, prepared: Prepared, cache: Path) -> GPTDatasetConfig:
    assert prepared.tokenizer is not None
    return GPTDatasetConfig(
        random_seed=experiment.training.seed,
        sequence_length=experiment.training.seq_length,
        blend=([str(prepared.prefix)], None),
        split=_split_text(experiment),
        path_to_cache=str(cache),
        tokenizer=_TokenizerFacts(prepared.tokenizer),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _split_text(experiment: Experiment) -> str:
    """data.split as Megatron-Core's parser reads it, which knows no exponents."""
    return ",".join(f"{Decimal(weight):f}" for weight in experiment.data.split)


def _documents(
    experiment: Experiment, prepared: Prepared, tokens: IndexedDataset, split: Split
) -> NDArray[np.int32]:
    """The documents of one part, by number."""
    begin, end = part_bounds(experiment.data.split, len(tokens))[split.value]
    return np.arange(begin, end, dtype=np.int32)


def _index_name(experiment: Experiment, prepared: Prepared, split: Split) -> str:
    """Names the index by everything that it depends on."""
    assert prepared.prefix is not None and prepared.tokenizer is not None
    stats = [path(prepared.prefix).stat() for path in (bin_path, idx_path)]
    depends_on = [
        str(prepared.prefix.resolve()),
        [(stat.st_size, stat.st_mtime_ns) for stat in stats],
        experiment.training.seed,
        experiment.training.seq_length,
        experiment.data.split,
        prepared.tokenizer.sha256,
        version("megatron-core"),
    ]
    return f"{split.name}-{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:12]}"
