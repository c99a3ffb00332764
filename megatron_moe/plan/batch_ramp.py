"""The global batch of each step, where it grows: `training.rampup_batch_size`."""

from __future__ import annotations

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


def ramp_steps(training: Training) -> int | None:
    """Steps before the first one with the whole global_batch_size; 0 without a ramp, None where the run ends
    before it.

    Steps of one size are counted at once: a ramp may be longer than anybody could wait for.
    """
    consumed_samples = steps = 0
    while steps < training.train_iters:
        size = global_batch_size(training, consumed_samples)
        if size == training.global_batch_size:
            return steps
        assert training.rampup_batch_size is not None
        start, increment, samples = training.rampup_batch_size
        # From so many consumed samples on the batch is larger.
        increments = (training.global_batch_size - start) // increment
        until = -(-((size - start) // increment + 1) * samples // increments)
        of_this_size = -(-(until - consumed_samples) // size)
        steps += of_this_size
        consumed_samples += of_this_size * size
    return None
