"""Weights in FP8 compute what the same numbers compute in full precision."""

from __future__ import annotations

import pytest
import quantized_on_ranks
import torch
from distributed import ranks
from tiny_families import Tiny, tiny
from torch import Tensor

PROMPTS = [[5, 9, 17, 33, 2, 64, 101], [7], list(range(40, 62))]


def in_fp8(matrix: Tensor) -> Tensor:
    """The numbers nearest to a matrix that E4M3 has with one scale, by the definition of the format: 4
    exponent bits with bias 7, 3 bits of fraction, largest 448."""
    scale = matrix.abs().max().double() / 448
    scaled = matrix.double() / scale
    exponent = scaled.abs().log2().floor().clamp(min=-6)
    step = 2.0 ** (exponent - 3)
    return ((scaled / step).round() * step * scale).float()


def rounded(model: Tiny) -> dict[str, Tensor]:
    """Our weights of a model, its matrices rounded to FP8, gates and up-projections apart."""
    weights = model.ours()
    for name, weight in weights.items():
        if ".layers." not in name or weight.dim() < 2 or "router" in name:
            continue
        parts = weight.chunk(2) if "fc1" in name else (weight,)
        weights[name] = torch.cat([in_fp8(part) for part in parts])
    return weights


@pytest.mark.second_pair
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama, one key head, linear"])
def test_logits_are_those_of_the_rounded_weights(name: str) -> None:
    model = tiny(name)
    experiment = model.experiment()
    given = [], PROMPTS, None
    ((found, error, tokens),) = ranks(1).run(
        quantized_on_ranks.logits_and_tokens, experiment, model.ours(), *given
    )
    ((exact, again, same),) = ranks(1).run(
        quantized_on_ranks.logits_and_tokens, experiment, rounded(model), *given
    )
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert tokens == same
    # Numbers that came from FP8 are told apart by nothing.
    assert again.largest <= 1e-4 < error.mean < error.largest
    assert again.same == 1.0


def test_ranks_with_whole_experts_have_the_same_scales() -> None:
    model = tiny("mixtral")
    given, layout = (model.experiment(), model.ours()), ["parallel.pipeline_model_parallel_size=2"]
    (one,) = ranks(1).run(quantized_on_ranks.logits_and_tokens, *given, [], PROMPTS, None)
    for found in ranks(2).run(quantized_on_ranks.logits_and_tokens, *given, layout, PROMPTS, None):
        assert found[2] == one[2]


def test_memory_is_a_quarter_of_that_in_fp32() -> None:
    model = tiny("deepseek_v3")
    ((before, after),) = ranks(1).run(quantized_on_ranks.bytes_of_matrices, model.experiment(), model.ours())
    assert after < 0.42 * before  # norms and routers are a good part of so small a model


def test_blocks_of_published_files_are_kept() -> None:
    """A matrix that came with a scale for each block comes back to the bit."""
    from megatron_moe.convert.fp8 import dequantized, quantized
    from megatron_moe.inference.quantized import Quantized

    values, scales = quantized(torch.randn(200, 300, generator=torch.Generator().manual_seed(1)))
    numbers = dequantized(values, scales, (128, 128), "a matrix")
    kept = Quantized(numbers[None], (128, 128))
    assert torch.equal(kept.values[0].float(), values.float())
    torch.testing.assert_close(kept.numbers()[0], numbers, rtol=1e-6, atol=0)
