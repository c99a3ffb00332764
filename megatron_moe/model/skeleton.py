"""Which weights the model of an experiment has, and how a checkpoint holds them.

Megatron-Core's own modules say so: they are built in one process on the meta device, where weights have
shapes and no memory.
"""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_moe.config.one_process import bare_model
from megatron_moe.config.schema import Experiment
from megatron_moe.engine import device as devices
from megatron_moe.engine import groups
from megatron_moe.engine.checkpoint import object_keys, sharded_weights
from megatron_moe.engine.weights import holds_weights, names_in, stacked_axes
from megatron_moe.model.gpt import build_chunk
from megatron_moe.model.transformer_config import transformer_config
from megatron_moe.plan import plan as plans


@dataclass(frozen=True)
class Skeleton:
    """A model without numbers.

    Attributes:
        tensors: shapes of the weights in a checkpoint, by key.
        objects: keys of what lies beside them, which holds nothing for the blocks that run everywhere.
    """

    tensors: Mapping[str, tuple[int, ...]]
    objects: tuple[str, ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each single weight, by name."""
        return {
            name: shape[stacked_axes(key) :]
            for key, shape in self.tensors.items()
            for _, name in names_in(key, shape)
        }


def skeleton(experiment: Experiment) -> Skeleton:
    """The skeleton of a filled experiment's model.

    Takes a second. Where the process is a rank already, another one does it: groups stay as they are.
    """
    if not dist.is_initialized():
        return _build(experiment)
    command = [sys.executable, "-m", "megatron_moe.model.skeleton"]
    done = subprocess.run(command, input=pickle.dumps(experiment), stdout=subprocess.PIPE, check=True)
    built: Skeleton = pickle.loads(done.stdout)
    return built


def _build(experiment: Experiment) -> Skeleton:
    experiment = bare_model(experiment)
    plan = plans.make(experiment, profiled=False)
    devices.start(0)
    with _alone(plan), torch.random.fork_rng(devices=[]), _on_meta_device():
        config = transformer_config(experiment, plan, 0, torch.float32)
        chunk = build_chunk(experiment, config, plan.stages[0], virtual=False)
        shapes: dict[str, tuple[int, ...]] = {}
        for tensor in sharded_weights([chunk]):
            if holds_weights(tensor.key):
                shapes[tensor.key] = tuple(tensor.global_shape)
        return Skeleton(shapes, tuple(object_keys([chunk])))


@contextlib.contextmanager
def _alone(plan: plans.Plan) -> Iterator[None]:
    """The groups of a single process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups.initialize_model_parallel(plan.layout, seed=0, timeout_s=60)
        yield
    finally:
        groups.destroy()
        groups.shutdown()


@contextlib.contextmanager
def _on_meta_device() -> Iterator[None]:
    """Modules ask for the current device when they make their weights."""
    asked = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device = asked


if __name__ == "__main__":
    sys.stdout.buffer.write(pickle.dumps(skeleton(pickle.load(sys.stdin.buffer))))
