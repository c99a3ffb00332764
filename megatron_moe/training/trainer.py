"""The training loop."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_moe.config.schema import Experiment
from megatron_moe.data.batches import Microbatches
from megatron_moe.data.blend import Blend
from megatron_moe.data.further_tokens import with_further_tokens
from megatron_moe.data.prepare import Prepared
from megatron_moe.data.samples import Samples
from megatron_moe.engine import schedule
from megatron_moe.engine.device import Device
from megatron_moe.engine.optimizer import learning_rates
from megatron_moe.model.moe.gates import needs_marks
from megatron_moe.plan.batch_ramp import global_batch_size
from megatron_moe.plan.plan import Plan
from megatron_moe.training import communication, router_updates
from megatron_moe.training.balance_metrics import balance_metrics
from megatron_moe.training.callback import Callback, Record
from megatron_moe.training.expert_similarity import expert_similarity
from megatron_moe.training.forward import Batch, forward_step
from megatron_moe.training.metrics import (
    StepSums,
    drops_of_evaluation,
    further_metrics,
    moe_metrics,
    reduce_step,
)
from megatron_moe.training.sample_metrics import counted, sample_metrics, split_tallies
from megatron_moe.training.step_meter import StepMeter

if TYPE_CHECKING:
    from megatron_moe.data.pretraining import Datasets


@dataclass
class Trainer:
    """One rank's share of a run, and how far it has come.

    Attributes:
        chunks: this rank's model chunks, wrapped for data parallelism.
        iteration: optimizer steps done.
        consumed_samples: sequences trained on.
        stop_requested: set from a signal; the ranks agree on it at the end of a step.
        stopped: they have agreed to stop.
        last_record: what the newest step, if this process has done one, came to.
        initialized_from: the model that the run started from, as its `checkpoint.initialize_from` named it.
    """

    experiment: Experiment
    plan: Plan
    device: Device
    chunks: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    prepared: Prepared
    datasets: Datasets
    run_folder: Path
    callbacks: Sequence[Callback] = ()
    initialized_from: str | None = None
    iteration: int = 0
    consumed_samples: int = 0
    stop_requested: bool = False
    stopped: bool = field(default=False, init=False)
    last_record: Record = field(default_factory=dict, init=False)
    step_meter: StepMeter | None = field(default=None, init=False)

    def fit(self) -> None:
        """Train until `training.train_iters` steps are done, or a signal asks to stop."""
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            batches = self.microbatches(self.datasets.train, self.consumed_samples, shuffle=True)
            while self.iteration < self.experiment.training.train_iters and not self.stopped:
                self.last_record = self.step(batches)
                for callback in self.callbacks:
                    callback.on_step(self, self.last_record)
            for callback in self.callbacks:
                callback.on_end(self)
        except BaseException:
            for callback in self.callbacks:
                callback.on_error(self)
            raise

    def step(self, batches: Iterator[Batch]) -> Record:
        """One optimizer step over the next global batch; its record."""
        self.step_meter = self.step_meter or StepMeter(self)
        with self.step_meter.step() as stopwatch:
            started = time.perf_counter()
            training = self.experiment.training
            sequences = global_batch_size(training, self.consumed_samples)
            shapes = self.shapes(sequences)
            schedule.zero_gradients(self.chunks, self.optimizer)
            # Iteration i trains at the schedule's i-th rate: the first is not zero, the last is min_lr.
            self.scheduler.num_steps = self.iteration
            self.scheduler.step(1)
            iterators = self.iterators(batches, shapes)
            reports = schedule.run(self.chunks, iterators, forward_step, shapes, stopwatch=stopwatch)
            # Before the update: there must be none where a router got numbers that are not finite.
            sums = reduce_step(
                self.experiment, self.chunks, reports, self.stop_requested, self.device.torch_device
            )
            with self.step_meter.update():
                # Without a target there is no gradient: only decay and old momentum would move the weights.
                updated, grad_norm = (
                    schedule.update(self.optimizer, self.chunks) if sums.targets else (False, 0.0)
                )
            if updated and sums.moe is not None:
                router_updates.end_iteration(self.experiment, self.chunks, sums.moe)
        self.stopped = sums.stop_requested
        self.iteration += 1
        self.consumed_samples += sequences
        step_time = time.perf_counter() - started
        record = self._record(sums, sequences, step_time, grad_norm, updated)
        return record | self.step_meter.take(shapes.num_microbatches)

    def _record(
        self, sums: StepSums, sequences: int, step_time: float, grad_norm: float, updated: bool
    ) -> Record:
        """What the step that was just done came to, over so many sequences. Collective over all ranks."""
        training = self.experiment.training
        tokens = sequences * training.seq_length
        record: Record = {
            "iteration": self.iteration,
            "loss": sums.loss / sums.targets if sums.targets else None,
            "grad_norm": grad_norm,
            **learning_rates(self.experiment, self.scheduler),
            "consumed_tokens": self.consumed_samples * training.seq_length,
            "step_time_s": step_time,
            "tokens_per_second": tokens / step_time,
            "model_tflops_per_device": self.plan.flops_per_token
            * tokens
            / step_time
            / self.plan.layout.world_size
            / 1e12,
        }
        if sums.further:
            record |= further_metrics(sums)
        if sums.samples is not None:
            record |= sample_metrics(sums.samples, sums.targets, tokens)
        if training.rampup_batch_size is not None:
            record["global_batch_size"] = sequences
        if self.prepared.reads_files and self.experiment.data.blend is None:
            record["epoch"] = self.consumed_samples / len(self.datasets.train)
        if not updated:
            record["skipped"] = (
                "the gradient norm is not finite" if sums.targets else "no token of the batch is a target"
            )
        if sums.moe is not None and sums.balance is not None:
            detailed = self.iteration % self.experiment.logging.detail_interval == 0
            record |= moe_metrics(sums.moe, self.experiment, detailed)
            microbatches = sums.moe.column("microbatches")
            record |= balance_metrics(sums.balance, microbatches, self.experiment, detailed)
            if detailed and self.experiment.logging.expert_similarity:
                record |= expert_similarity(self.experiment, self.chunks, self.device.torch_device)
        if communication.copies_experts(self.experiment):
            record |= communication.copied_experts(self.chunks, self.device.torch_device)
        return record

    def evaluate(self, dataset: Samples, iterations: int) -> Record:
        """`eval/loss`, the mean loss a target token over the first `iterations` global batches of `dataset`,
        in order, and of records `eval/sample_loss`. Where several sources are blended, also that over each
        one's samples among them, `eval/loss/<name>`; NaN where there are none. And `eval/drop_rate`, where
        routers drop anything."""
        names = [part.name for part in dataset.parts] if isinstance(dataset, Blend) else [""]
        batches = self.microbatches(dataset, 0, shuffle=False)
        shapes = self.shapes()
        for chunk in self.chunks:
            chunk.eval()
        reports = []
        with torch.no_grad():
            for _ in range(iterations):
                reports += schedule.run(
                    self.chunks, self.iterators(batches, shapes), forward_step, shapes, forward_only=True
                )
        for chunk in self.chunks:
            chunk.train()
        width = 2 * len(names) + counted(self.experiment)
        sums = schedule.sum_over_ranks(reports, self.device.torch_device, width)
        samples = split_tallies(sums[2 * len(names) :])
        sums = sums[: 2 * len(names)]
        of_sources = list(zip(sums[::2], sums[1::2], strict=True))
        losses, targets = (sum(column) for column in zip(*of_sources, strict=True))
        record: Record = {"eval/loss": losses / targets if targets else math.nan}
        if samples is not None:
            record["eval/sample_loss"] = samples.loss / samples.samples if samples.samples else math.nan
        record |= drops_of_evaluation(self.experiment, self.chunks, self.device.torch_device)
        if len(names) > 1:
            record |= {
                f"eval/loss/{name}": losses / targets if targets else math.nan
                for name, (losses, targets) in zip(names, of_sources, strict=True)
            }
        return record

    def microbatches(self, dataset: Samples, consumed_samples: int, shuffle: bool) -> Iterator[Batch]:
        """This replica's microbatches from a position on, on this rank's device."""
        from megatron.core import parallel_state

        training = self.experiment.training
        batches = Microbatches(
            dataset,
            seed=training.seed,
            consumed_samples=consumed_samples,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            micro_batch_size=training.micro_batch_size,
            global_batch_size=training.global_batch_size,
            shuffle=shuffle,
        )
        lora = training.lora
        marked = self.experiment.moe is not None and needs_marks(self.experiment.moe)
        marked |= lora is not None and lora.dropout > 0
        further = self.experiment.model.mtp_num_layers
        wholes = (with_further_tokens(batch, further) if further else batch for batch in batches)
        return (schedule.share_of_context(batch, self.device.torch_device, marked) for batch in wholes)

    def iterators(self, batches: Iterator[Batch], shapes: schedule.Shapes) -> list[Iterator[Batch]]:
        """The next global batch's microbatches, once for each model chunk of this rank."""
        this_step = list(itertools.islice(batches, shapes.num_microbatches))
        if self.experiment.training.calculate_per_token_loss:
            means = {"mean_targets": schedule.mean_targets(this_step)}
            if self.experiment.model.mtp_num_layers:
                means["mean_further_targets"] = schedule.mean_targets(this_step, "further_targets")
            this_step = [{**batch, **means} for batch in this_step]
        elif self.experiment.data.instruction is not None:
            means = {"mean_targets": schedule.mean_targets(this_step, "num_samples")}
            this_step = [{**batch, **means, "loss_weights": batch["sample_weights"]} for batch in this_step]
        if self.chunks[0].training:
            router_updates.begin_iteration(self.experiment, self.chunks, this_step)
        return [iter(this_step) for _ in self.chunks]

    def shapes(self, sequences: int | None = None) -> schedule.Shapes:
        """What a step over so many sequences, by default a whole global batch, sends through the pipeline."""
        training, replicas = self.experiment.training, self.plan.layout.data_parallel_size
        sequences = sequences or training.global_batch_size
        return schedule.Shapes(
            sequences // (training.micro_batch_size * replicas),
            training.micro_batch_size,
            training.seq_length,
        )
