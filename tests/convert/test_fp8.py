"""Weights in FP8 with scales, as other programs write them, in and out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_folders import tensors_of, write_folder
from tiny_families import tiny
from torch import Tensor

from megatron_moe.cli import main
from megatron_moe.convert.fp8 import dequantized, quantized
from megatron_moe.convert.models import open_model

FP8 = torch.float8_e4m3fn


def by_hand(tensor: Tensor, scale: Tensor, block: int) -> np.ndarray:
    """Each number times the scale of the block that it lies in, in float64."""
    values, scales = tensor.double().numpy(), scale.double().numpy()
    result = np.empty(values.shape)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            result[row, column] = values[row, column] * scales[row // block, column // block]
    return result


def test_every_kind_of_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(5, 7, generator=generator).to(FP8)
    scale = torch.rand(3, 3, generator=generator)
    blocks = dequantized(tensor, scale[:, :3], (2, 3), "w").numpy()
    expected = np.array(
        [[tensor[r, c].item() * scale[r // 2, c // 3].item() for c in range(7)] for r in range(5)]
    )
    np.testing.assert_allclose(blocks, expected, rtol=1e-6)
    for one in (scale[0, 0], scale[0, :1]):
        assert torch.equal(dequantized(tensor, one, (2, 3), "w"), tensor.float() * one.reshape(()))
    rows = torch.rand(5, 1, generator=generator)
    assert torch.equal(dequantized(tensor, rows, (2, 3), "w"), tensor.float() * rows)
    experts = torch.stack([tensor, tensor])
    one_each = torch.tensor([0.5, 3.0])
    assert torch.equal(
        dequantized(experts, one_each, (2, 3), "w"),
        torch.stack([tensor.float() * 0.5, tensor.float() * 3.0]),
    )


@pytest.mark.parametrize("shape", [(128, 128), (130, 300), (3, 64)])
def test_quantized_is_within_half_a_step_of_its_block(shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values[0] = 0
    packed, scale = quantized(values)
    assert packed.dtype == FP8 and scale.shape == tuple(math.ceil(size / 128) for size in shape)
    back = by_hand(packed, scale, 128)
    # Three bits behind the point: a sixteenth of the number, and of the smallest ones 2^-10 of a scale.
    bound = values.abs().double().numpy() / 16 + scale.max().item() * 2.0**-10
    assert (np.abs(back - values.double().numpy()) <= bound).all()
    assert packed.float().abs().max() == 448


def test_out_and_in_again(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", "deepseek_v3")
    assert main(["import", str(source), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "small"), "--dtype", "fp8"]) == 0
    exact, small = tensors_of(source), tensors_of(tmp_path / "small")
    packed = {name for name, tensor in small.items() if tensor.dtype == FP8}
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in packed
    exceptions = ("mlp.gate.weight", "norm.weight", "embed_tokens.weight", "head.weight", "eh_proj.weight")
    assert not any(name.endswith(exceptions) for name in packed)
    for name in packed:
        np.testing.assert_allclose(
            by_hand(small[name], small[f"{name}_scale_inv"], 128),
            exact[name].bfloat16().double().numpy(),
            rtol=1 / 16,
            atol=2.0**-10 * small[f"{name}_scale_inv"].max().item(),
        )
    for name in exact.keys() - packed:
        balances = name.endswith("e_score_correction_bias")
        assert torch.equal(small[name], exact[name] if balances else exact[name].bfloat16())
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert "gate" in config["quantization_config"]["modules_to_not_convert"]

    assert main(["import", str(tmp_path / "small"), str(tmp_path / "again"), "--dtype", "fp32"]) == 0
    weights = open_model(tmp_path / "again").weights
    up = "model.layers.1.mlp.experts.3.up_proj.weight"
    rows = weights.read("decoder.layers.1.mlp.experts.3.linear_fc1.weight")[len(exact[up]) :]
    np.testing.assert_allclose(rows.numpy(), by_hand(small[up], small[f"{up}_scale_inv"], 128), rtol=1e-6)


def test_what_cannot_be_undone_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    source = write_folder(tmp_path / "source", "llama")
    name = "model.layers.0.mlp.down_proj.weight"
    weights = tensors_of(source)
    weights[name] = weights[name].to(FP8)
    for scale, words in ((None, "have no scale"), (torch.ones(3, 2), "are not one for each block")):
        save_file(
            weights | ({} if scale is None else {f"{name}_scale_inv": scale}), source / "model.safetensors"
        )
        capsys.readouterr()
        assert main(["import", str(source), str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert name in line and words in line
    config = tiny("llama").config | {"quantization_config": {"quant_method": "gptq"}}
    (source / "config.json").write_text(json.dumps(config))
    assert main(["import", str(source), str(tmp_path / "out")]) == 2
    assert "'gptq' cannot be read" in capsys.readouterr().err
