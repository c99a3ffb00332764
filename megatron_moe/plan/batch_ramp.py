"""The global batch of each step, where it grows: `training.rampup_batch_size`."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_moe.config.schema import Training


def global_batch_size(training: Training, consumed_samples: int) -> int:
    """Sequences of the step that begins after so many.

    As num_microbatches_calculator of Megatron-Core 0.16 (0.19 has it no more), in whole numbers: the n
    increments between start and global_batch_size follow each other every samples / n.
    """
    if training.rampup_batch_size is None:
        return training.global_batch_size
    start, increment, samples = training.rampup_batch_size
    increments = (training.global_batch_size - start) // increment
    done = consumed_samples * increments // samples
    return start + min(done, increments) * increment


def global_batch_sizes(training: Training) -> Iterator[int]:
    """Those of step 1, 2, ... without end."""
    consumed_samples = 0
    while True:
        size = global_batch_size(training, consumed_samples)
        yield size
        consumed_samples += size


def ramp_steps(training: Training) -> int:
    """Steps before the first one with the whole global_batch_size; 0 without a ramp."""
    if training.rampup_batch_size is None:
        return 0
    for steps, size in enumerate(global_batch_sizes(training)):
        if size == training.global_batch_size:
            return steps
    raise AssertionError("batches grow without end")
