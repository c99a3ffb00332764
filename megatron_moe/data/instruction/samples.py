"""Sequences of records as a dataset."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_moe.data.instruction.packing import Sequences
from megatron_moe.data.instruction.selection import Selection


class InstructionSamples:
    """Sequences of `seq_length`, each of one record or of several that don't see each other.

    Beside what `data.samples` says of every dataset there are `sample_weights` [s] float32, 1 / n at each of
    a record's n targets, and `filled` [s] bool, false where a sequence is filled up. `padding_mask` is true
    wherever there is no target: routers leave prompts out of their account too. A place is a target's where
    the token behind it is an answer's; the last token of an answer ends it and is not read.
    """

    def __init__(
        self, selection: Selection, sequences: Sequences, seq_length: int, filler: int, packing: bool
    ) -> None:
        """`filler`: the token that fills a sequence up. `packing`: records begin with positions of their own,
        and documents do."""
        self.selection, self.sequences = selection, sequences
        self._seq_length, self._filler, self._packing = seq_length, filler, packing

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length = self._seq_length
        tokens = np.full(length, self._filler, np.int64)
        labels = np.full(length, self._filler, np.int64)
        targets = np.zeros(length, np.bool_)
        starts = np.zeros(length, np.bool_)
        weights = np.zeros(length, np.float32)
        positions = np.arange(length)
        end = 0
        records = self.selection.records
        for member in self.sequences.of(index).tolist():
            begin, size = end, int(self.selection.places[member])
            end = begin + size
            first = int(records.begins[self.selection.numbers[member]])
            ids = records.tokens[first : first + size + 1]
            learned = records.targets[first + 1 : first + size + 1]
            tokens[begin:end], labels[begin:end] = ids[:-1], ids[1:]
            targets[begin:end] = learned
            weights[begin:end] = learned / np.float32(learned.sum())
            starts[begin] = True
            positions[begin:] = np.arange(length - begin)
        sample = {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
            "loss_mask": torch.from_numpy(targets.astype(np.float32)),
            "padding_mask": torch.from_numpy(~targets),
            "sample_weights": torch.from_numpy(weights),
            "filled": torch.arange(length) < end,
        }
        if self._packing:
            starts[end : end + 1] = True
            sample["document_starts"] = torch.from_numpy(starts)
        return sample

    def padding(self) -> float:
        """Share of all places that are filled up."""
        return 1 - int(self.selection.places.sum()) / (len(self) * self._seq_length)
