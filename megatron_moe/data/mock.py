"""Random tokens for benchmarks: no files, and the same sample for the same seed, part and index
everywhere."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LENGTH = 1 << 20


class MockDataset:
    """Samples of independent, evenly distributed tokens."""

    def __init__(self, vocab_size: int, seq_length: int, seed: int, part: int) -> None:
        """`part`: 0 for training, 1 for validation; each has samples of its own."""
        self._vocab_size = vocab_size
        self._seq_length = seq_length
        self._seed = seed
        self._part = part

    def __len__(self) -> int:
        return _LENGTH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample `index`; its labels are its tokens moved by one."""
        generator = np.random.Generator(np.random.PCG64([self._seed, self._part, index]))
        text = torch.from_numpy(generator.integers(0, self._vocab_size, self._seq_length + 1, dtype=np.int64))
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(self._seq_length),
            "position_ids": torch.arange(self._seq_length),
        }
