"""Run on ranks: training with fused kernels, whose place the unfused computation takes and is counted."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from train_on_ranks import steps

from megatron_moe.config.schema import Experiment


def _kernels() -> dict[str, Callable[..., Any]]:
    """Transformer Engine's and apex's functions by name, with their signatures, from Megatron-Core's own."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils

    def rotate(t: Tensor, freqs: Tensor, interleaved: bool = False) -> Tensor:
        return rope_utils._apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=interleaved)

    def permute_with_probs(tokens: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int) -> Any:
        return moe_utils.permute(tokens, routing_map, probs, num_out_tokens)[:3]

    def unpermute(
        tokens: Tensor, indices: Tensor, merging_probs: Any, restore_shape: Any, **more: Any
    ) -> Any:
        assert merging_probs is None
        return moe_utils.unpermute(tokens, indices, restore_shape)

    def sort_chunks(tokens: Tensor, probs: Tensor, sizes: Tensor, order: Tensor) -> Any:
        return moe_utils.sort_chunks_by_idxs(tokens, sizes, order, probs=probs)

    def accumulate(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        main_grad += grad_output.t() @ inputs

    return {
        "fused_apply_rotary_pos_emb": rotate,
        "fused_permute": lambda *args, **kwargs: NotImplemented,
        "fused_permute_with_probs": permute_with_probs,
        "fused_sort_chunks_by_index": lambda *args: moe_utils.sort_chunks_by_idxs(*args)[0],
        "fused_sort_chunks_by_index_with_probs": sort_chunks,
        "fused_unpermute": unpermute,
        "wgrad_gemm_accum_fp32": accumulate,
    }


def with_stand_ins(experiment: Experiment, run: Path, count: int) -> tuple[list[Any], Counter[str]]:
    """The records of the first steps, and how often each kernel was called on this rank."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer.moe import moe_utils

    calls: Counter[str] = Counter()

    def counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return kernel(*args, **kwargs)

        return call

    kernels = {name: counted(name, kernel) for name, kernel in _kernels().items()}
    apex = SimpleNamespace(wgrad_gemm_accum_fp32=kernels.pop("wgrad_gemm_accum_fp32"))
    rotate = {"fused_apply_rotary_pos_emb": kernels.pop("fused_apply_rotary_pos_emb")}
    fusion = {"fused_weight_gradient_mlp_cuda": apex, "_grad_accum_fusion_available": True}
    with (
        mock.patch.multiple(moe_utils, create=True, HAVE_TE=True, is_te_min_version=_old, **kernels),
        mock.patch.multiple(rope_utils, **rotate),
        mock.patch.multiple(layers, create=True, **fusion),
        mock.patch.object(torch, "arange", functools.partial(_on_the_host, torch.arange)),
    ):
        return steps(experiment, run, count), calls


def _on_the_host(arange: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """For kernels the dispatcher keeps its indices on the GPU."""
    return arange(*args, **{**kwargs, "device": "cpu"})


def _old(version: str) -> bool:
    """Whether Transformer Engine is that new: 2.7."""
    return version <= "2.7"
