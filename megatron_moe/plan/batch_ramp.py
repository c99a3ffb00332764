"""The global batch of each step, where it grows: `training.rampup_batch_size`."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_moe.config.schema import Experiment, Training


def num_microbatches(experiment: Experiment) -> int:
    """Microbatches that a replica runs in a step with the whole global batch, of a filled experiment."""
    replicas = experiment.parallel.data_parallel_size
    assert replicas is not None
    return experiment.training.global_batch_size // (experiment.training.micro_batch_size * replicas)


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


def batches(training: Training) -> Iterator[tuple[int, int]]:
    """All steps of a run in order: how many, one behind the other, have a global batch of which size.

    Steps of one size are counted at once: a ramp may be longer than anybody could wait for.
    """
    consumed_samples = steps = 0
    while steps < training.train_iters:
        size = global_batch_size(training, consumed_samples)
        left = training.train_iters - steps
        if size == training.global_batch_size:
            yield left, size
            return
        assert training.rampup_batch_size is not None
        start, increment, samples = training.rampup_batch_size
        # From so many consumed samples on the batch is larger.
        increments = (training.global_batch_size - start) // increment
        until = -(-((size - start) // increment + 1) * samples // increments)
        of_this_size = min(left, -(-(until - consumed_samples) // size))
        yield of_this_size, size
        steps += of_this_size
        consumed_samples += of_this_size * size


def ramp_steps(training: Training) -> int | None:
    """Steps before the first one with the whole global_batch_size; 0 without a ramp, None where the run ends
    before it."""
    before = 0
    for steps, size in batches(training):
        if size == training.global_batch_size:
            return before
        before += steps
    return None


def samples(training: Training) -> int:
    """Sequences that the whole run trains on."""
    return sum(steps * size for steps, size in batches(training))
