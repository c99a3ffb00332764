"""Tiny models as Hugging Face folders on disk, and what lies in such folders."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_families import tiny
from torch import Tensor


def write_folder(folder: Path, name: str) -> Path:
    """The model of a case of `tiny_families`, with files beside its weights."""
    from safetensors.torch import save_file

    model = tiny(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "README.md").write_text("A model.")
    weights = {name: tensor.clone() for name, tensor in model.weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of all safetensors files of a folder."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
