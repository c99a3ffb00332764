"""One rank of `generate`."""

from __future__ import annotations

import os
import sys
from functools import partial

import torch.distributed as dist

from megatron_moe.convert.models import Model, open_model, read_config
from megatron_moe.engine import device as devices
from megatron_moe.engine import groups
from megatron_moe.engine.device import Device
from megatron_moe.inference.building import build
from megatron_moe.inference.job import Job
from megatron_moe.inference.layout import inference_experiment
from megatron_moe.inference.network import Network
from megatron_moe.inference.output import Output, stops_at, watched
from megatron_moe.inference.precision import logit_error, logits_of
from megatron_moe.inference.prompts import tokenizer_of
from megatron_moe.inference.quantized import quantize

_TIMEOUT_S = 600
_COMPARED = 512
"""Tokens of each prompt whose logits are compared."""


def run(job: Job) -> int:
    """Generate what a job asks for; rank 0 writes it. RANK and the like name the rank, or there is one only.
    Returns the exit code. Raises InputError."""
    device = join()
    model = open_model(job.model)
    tokenizer = tokenizer_of(model)
    dtype = device.resolve_precision("auto" if job.dtype == "fp8" else job.dtype)
    generator = build(inference_experiment(model.experiment, job.overrides), model.weights, device, dtype)
    if job.dtype == "fp8":
        _quantize(job, model, generator.network)
    output = Output(job, tokenizer) if dist.get_rank() == 0 else None
    generator.generate(
        [prompt.ids for prompt in job.prompts],
        job.settings,
        on_token=None if output is None else output.take,
        stop=partial(watched, stops_at(job, tokenizer)),
    )
    if output is not None:
        output.close()
    return 0


def _quantize(job: Job, model: Model, network: Network) -> None:
    """Put the weights into FP8, and say on request what that does to the logits."""
    prompts = [prompt.ids[:_COMPARED] for prompt in job.prompts]
    exact = logits_of(network, prompts) if job.logit_error else []
    quantize(network, block_of(model))
    if job.logit_error:
        error = logit_error(exact, logits_of(network, prompts))
        if dist.get_rank() == 0:
            print(f"FP8: {error}", file=sys.stderr, flush=True)


def block_of(model: Model) -> list[int] | None:
    """The blocks of a matrix that have scales in the model's own files; None where none are told of."""
    if model.huggingface is None:
        return None
    config, _ = read_config(model.huggingface)
    block: list[int] | None = (config.get("quantization_config") or {}).get("weight_block_size")
    return block


def join() -> Device:
    """Make this process a rank, alone where nothing says that there are others."""
    device = devices.start(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        groups.initialize_process_group(device, _TIMEOUT_S)
    elif not dist.is_initialized():
        dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1)
    return device
