"""Weights in FP8 (E4M3) with scales beside them, in the form of DeepSeek-V3's files: `x.weight` is multiplied
by `x.weight_scale_inv`, which has one number for each block of 128 x 128, each row, or each matrix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.convert.family import Json
from megatron_moe.convert.safetensors_files import SafetensorsFolder
from megatron_moe.convert.safetensors_writer import TensorGroups
from megatron_moe.convert.weights import Weight

FP8 = torch.float8_e4m3fn
_KINDS = (FP8, torch.float8_e5m2)
_SUFFIXES = ("_scale_inv", "_scale")
"""Of the names of scales. Both multiply; the first is called after what the writer did."""
_BLOCK = 128
_LARGEST = 448.0
"""Of the numbers of E4M3."""
CONFIG_KEY = "quantization_config"
_LINEAR = re.compile(r".*\.layers\.\d+\..*(_proj|\.w[123])(\.weight)?")
_LEFT = re.compile(r".*\.eh_proj\.weight")
"""What joins a further token's embedding to the model: not in FP8 in DeepSeek-V3's files either."""


class Dequantized:
    """The tensors of a folder, those in FP8 as float32; scales are not told of.

    Args:
        config: the folder's config.json. Raises InputError where it names another way of quantizing, or a
            weight in FP8 has no scale.
    """

    def __init__(self, files: SafetensorsFolder, config: Json) -> None:
        self._files = files
        given = config.get(CONFIG_KEY) or {}
        if not isinstance(given, dict):
            raise InputError(f"config.json: {CONFIG_KEY}: {given!r} is no section")
        if (method := given.get("quant_method", "fp8")) != "fp8":
            raise InputError(
                f"config.json: {CONFIG_KEY}: quant_method {method!r} cannot be read; get the model without "
                "quantization, or in FP8 with one scale a block or matrix"
            )
        block = given.get("weight_block_size") or [_BLOCK, _BLOCK]
        if not isinstance(block, list) or not all(type(size) is int and size > 0 for size in block):
            raise InputError(
                f"config.json: {CONFIG_KEY}: weight_block_size {block!r} is no list such as [128, 128]"
            )
        self._block = tuple(block)
        stored = files.inventory()
        self._scales = {
            name: next((name + suffix for suffix in _SUFFIXES if name + suffix in stored), None)
            for name, weight in stored.items()
            if weight.dtype in _KINDS
        }
        if alone := sorted(name for name, scale in self._scales.items() if scale is None):
            raise InputError(f"{len(alone)} tensors are in FP8 and have no scale: {', '.join(alone)}")
        hidden = set(self._scales.values())
        self._inventory = {
            name: weight._replace(dtype=torch.float32) if name in self._scales else weight
            for name, weight in stored.items()
            if name not in hidden
        }

    @property
    def any(self) -> bool:
        """Whether anything is in FP8."""
        return bool(self._scales)

    def inventory(self) -> Mapping[str, Weight]:
        return self._inventory

    def read(self, name: str) -> Tensor:
        tensor, scale = self._files.read(name), self._scales.get(name)
        return tensor if scale is None else dequantized(tensor, self._files.read(scale), self._block, name)


def dequantized(tensor: Tensor, scale: Tensor, block: Sequence[int], name: str) -> Tensor:
    """[.., r, c] in FP8 times its scales, in float32.

    Args:
        scale: one number; or of each leading dimension one; or of as many dimensions as the tensor, in each
            of the last two one for all, one for each place, or one for each `block` of places. Raises
            InputError, naming the tensor, for any other shape.
    """
    values, scale = tensor.float(), scale.float()
    if scale.numel() == 1:
        return values * scale.reshape(())
    if scale.dim() < values.dim():
        scale = scale.reshape(*scale.shape, *(1 for _ in range(values.dim() - scale.dim())))
    for dim in range(values.dim()):
        size, count = values.size(dim), scale.size(dim)
        if count in (1, size):
            continue
        length = block[dim - values.dim()] if values.dim() - dim <= len(block) else 0
        if not length or -(-size // length) != count:
            raise InputError(
                f"{name}: its scales {list(scale.shape)} are not one for each block of {list(block)} of "
                f"{list(tensor.shape)}, nor one a row or matrix"
            )
        scale = scale.repeat_interleave(length, dim).narrow(dim, 0, size)
    return values * scale


def quantized(values: Tensor) -> tuple[Tensor, Tensor]:
    """[.., r, c] -> FP8, and the scales of its blocks [.., ceil(r / 128), ceil(c / 128)]: the largest number
    of each becomes the largest of E4M3."""
    *leading, rows, columns = values.shape
    down, across = -(-rows // _BLOCK), -(-columns // _BLOCK)
    padded = values.new_zeros(*leading, down * _BLOCK, across * _BLOCK, dtype=torch.float32)
    padded[..., :rows, :columns] = values
    blocks = padded.reshape(*leading, down, _BLOCK, across, _BLOCK)
    largest = blocks.abs().amax((-3, -1))
    scale = torch.where(largest > 0, largest / _LARGEST, 1.0)
    blocks = (blocks / scale[..., :, None, :, None]).clamp_(-_LARGEST, _LARGEST)
    return blocks.reshape(padded.shape)[..., :rows, :columns].contiguous().to(FP8), scale


class Quantized:
    """Linear layers and experts in FP8, all else as it is: embeddings, norms, routers, the output layer."""

    def __init__(self, tensors: TensorGroups) -> None:
        self._tensors = tensors

    def groups(self) -> list[dict[str, Weight]]:
        return [
            {made: what for item in group.items() for made, what in _stored(*item)}
            for group in self._tensors.groups()
        ]

    def make(self, number: int) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._tensors.make(number):
            if _is_linear(name, Weight(tuple(tensor.shape), tensor.dtype)):
                values, scale = quantized(tensor.float())
                yield name, values
                yield name + _SUFFIXES[0], scale
            else:
                yield name, tensor

    def config(self) -> dict[str, object]:
        """What config.json says of it: also which linear layers are left as they are."""
        left = {
            name.split(".")[-2]
            for group in self._tensors.groups()
            for name, weight in group.items()
            if name.endswith(".weight") and len(weight.shape) > 1 and not _is_linear(name, weight)
        }
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_BLOCK, _BLOCK],
            "modules_to_not_convert": sorted({"lm_head", *left} - {"embed_tokens"}),
        }


def _is_linear(name: str, weight: Weight) -> bool:
    return len(weight.shape) > 1 and bool(_LINEAR.fullmatch(name)) and not _LEFT.fullmatch(name)


def _stored(name: str, weight: Weight) -> Iterator[tuple[str, Weight]]:
    """What the files have for a tensor."""
    if not _is_linear(name, weight):
        yield name, weight
        return
    *leading, rows, columns = weight.shape
    yield name, weight._replace(dtype=FP8)
    yield name + _SUFFIXES[0], Weight((*leading, -(-rows // _BLOCK), -(-columns // _BLOCK)), torch.float32)
