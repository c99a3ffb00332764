"""What the pieces of a model really keep for the backward pass, and need beside, on each rank."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_moe.config.schema import Experiment
from megatron_moe.model.moe.experts import Experts

HEAD, EMBEDDING = "head", "embedding"


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operations made and that are still there, wherever they are held."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.left_out: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                known = self.seen.get(storage._cdata)
                if known is None or known[0].expired():
                    self.left_out.discard(storage._cdata)
                    self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return output

    def leave_out(self) -> None:
        """Count nothing of what is there now: weights of which there are views, buffers that stay."""
        self.left_out = {key for key, (storage, _) in self.seen.items() if not storage.expired()}

    def now(self) -> int:
        if torch.distributed.get_world_size() > 1:
            time.sleep(0.02)  # threads of collectives hold for a moment what they sent
        live = {key: size for key, (storage, size) in self.seen.items() if not storage.expired()}
        return sum(self._size(key, size) for key, size in live.items() if key not in self.left_out)

    def _size(self, key: int, size: int) -> int:
        # What is recomputed gives its memory back, and keeps its storage.
        storage = torch.UntypedStorage._new_with_weak_ptr(key)
        return 0 if storage is None else storage.nbytes()


def kept(experiment: Experiment) -> dict[str, float]:
    """Bytes that are there for the backward pass since each piece began, until the next one does:
    `embedding`, `0`, `1`, .. for the layers, `head`, with multi-token-prediction layers. The model is on one
    pipeline stage."""
    model, step = _model(experiment)
    live = LiveBytes()
    begins: dict[str, int] = {}
    _at_begin(model, lambda name: begins.setdefault(name, live.now()))
    with live:
        step(lambda: None)
        live.leave_out()
        begins.clear()
        step(lambda: begins.update({"end": live.now()}))
    return {name: begins[following] - begins[name] for name, following in itertools.pairwise(begins)}


def kept_as_on_a_gpu(experiment: Experiment) -> dict[str, float]:
    """`kept`, experts being grouped products and norms fused, as they are there."""
    with (
        mock.patch.object(Experts, "_loops", lambda self, tokens: False),
        mock.patch.object(torch.nn.functional, "rms_norm", _FusedNorm.apply),
    ):
        return kept(experiment)


class _FusedNorm(torch.autograd.Function):
    """Saves what torch's kernel does: input, weight and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        scale = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, None]:
        x, weight, _ = ctx.saved_tensors
        return torch.zeros_like(x), None, torch.zeros_like(weight), None


def _at_begin(model: Any, tell: Callable[[str], object]) -> None:
    def hook(name: str) -> Callable[..., None]:
        def told(*args: object) -> None:
            tell(name)

        return told

    model.embedding.register_forward_pre_hook(hook(EMBEDDING))
    for number, layer in enumerate(model.decoder.layers):
        layer.register_forward_pre_hook(hook(str(number)), with_kwargs=True)
    model.decoder.final_layernorm.register_forward_pre_hook(hook(HEAD))


def _model(experiment: Experiment) -> tuple[Any, Callable[[Callable[[], None]], None]]:
    """The model of this rank, and a function that runs a microbatch both ways and calls back between."""
    from megatron.core.utils import get_model_config

    from megatron_moe.data.further_tokens import with_further_tokens
    from megatron_moe.engine import groups, schedule
    from megatron_moe.engine.optimizer import wrap_data_parallel
    from megatron_moe.model.gpt import build_chunks
    from megatron_moe.plan.plan import make
    from megatron_moe.training.forward import forward_step

    plan, training = make(experiment), experiment.training
    groups.initialize_model_parallel(plan.layout, training.seed, 60)
    dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
    chunks = build_chunks(experiment, plan, dtype)
    (wrapped,) = wrap_data_parallel(get_model_config(chunks[0]), chunks, experiment.parallel)
    vocab_size = experiment.model.vocab_size
    assert vocab_size is not None
    tokens = torch.randint(0, vocab_size, (training.micro_batch_size, training.seq_length))
    batch = {
        "tokens": tokens,
        "labels": tokens.roll(-1),
        "loss_mask": torch.ones(tokens.shape),
        "position_ids": torch.arange(training.seq_length).expand_as(tokens).contiguous(),
    }
    if experiment.model.mtp_num_layers:
        batch = with_further_tokens(batch, experiment.model.mtp_num_layers)
    batch = schedule.share_of_context(batch, torch.device("cpu"))

    def step(between: Callable[[], None]) -> None:
        output, loss_function = forward_step(iter([batch]), wrapped)
        loss = loss_function(output)[0]
        del output
        between()
        loss.backward()
        wrapped.zero_grad_buffer()

    return getattr(chunks[0], "module", chunks[0]), step


def working(experiment: Experiment) -> dict[str, int]:
    """Bytes that each piece needs at most, beside what it and those before it keep, while its forward or its
    backward pass runs: `0`, `1`, .. for the layers, `head`. On one rank: of what other threads do nothing is
    seen."""
    from megatron_moe.engine.memory import MOMENT, HostMeter

    def mark(name: str) -> None:
        with torch.profiler.record_function(MOMENT + name):
            pass

    model, step = _model(experiment)
    step(lambda: None)
    names = [str(number) for number in range(len(model.decoder.layers))]
    stream = _mark_layers(model, mark)
    meter = HostMeter()
    meter.start()
    step(lambda: mark("end"))
    moments = meter.moments()
    order = [name for name, _ in moments]
    live = {name: reading.live for name, reading in moments}

    def most(first: str, last: str) -> int:
        return max(reading.peak for _, reading in moments[order.index(first) + 1 : order.index(last) + 1])

    found = {}
    for name, following in zip(names, [*names[1:], HEAD], strict=True):
        kept = live[f"forward {following}"] - stream()
        there = most(f"forward {name}", f"forward {following}")
        found[name] = max(there, most(f"backward {following}", f"backward {name}")) - kept
    found[HEAD] = max(most(f"forward {HEAD}", "end"), most("end", f"backward {HEAD}")) - live["end"]
    return found


def _mark_layers(model: Any, mark: Callable[[str], None]) -> Callable[[], int]:
    """Marks where the forward pass of each piece begins, and where its backward pass ends. Gives a function
    for the bytes of the residual stream, once it was there."""
    sizes: list[int] = []

    def marked(name: str) -> Callable[..., None]:
        def told(module: Any, args: Any, kwargs: Any) -> None:
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            sizes.append(hidden.nbytes)
            mark(f"forward {name}")
            hidden.register_hook(lambda gradient: mark(f"backward {name}"))

        return told

    for number, layer in enumerate(model.decoder.layers):
        layer.register_forward_pre_hook(marked(str(number)), with_kwargs=True)
    model.decoder.final_layernorm.register_forward_pre_hook(marked(HEAD), with_kwargs=True)
    return lambda: sizes[0]


def static(experiment: Experiment) -> tuple[int, int, int]:
    """Bytes of this rank's weights, gradients and optimizer behind an update."""
    from megatron.core.utils import get_model_config

    from megatron_moe.engine import groups, schedule
    from megatron_moe.engine.memory import static_bytes
    from megatron_moe.engine.optimizer import build_optimizer, wrap_data_parallel
    from megatron_moe.model.gpt import build_chunks
    from megatron_moe.plan.plan import make

    plan, training = make(experiment), experiment.training
    groups.initialize_model_parallel(plan.layout, training.seed, 60)
    dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
    chunks = build_chunks(experiment, plan, dtype)
    wrapped = wrap_data_parallel(get_model_config(chunks[0]), chunks, experiment.parallel)
    optimizer = build_optimizer(experiment, wrapped, dtype)
    schedule.zero_gradients(wrapped, optimizer)
    schedule.update(optimizer, wrapped)
    buffers: list[Any] = [
        buffer
        for chunk in wrapped
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)  # type: ignore[misc]
    ]
    weights = sum(buffer.param_data.nbytes for buffer in buffers)
    gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
    return weights, gradients, static_bytes(wrapped, optimizer) - weights - gradients
