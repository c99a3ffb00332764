"""The tensors of a Hugging Face folder, read one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.convert.safetensors_header import Stored, read_header
from megatron_moe.convert.weights import Weight

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")
_SAFE = (
    'python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained({folder!r}).'
    "save_pretrained('NEW')\""
)


class SafetensorsFolder:
    """What the safetensors files of a folder hold, by the names that stand in them.

    Raises InputError, with all problems, where they are missing, incomplete or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stored: dict[str, Stored] = {}
        problems: list[str] = []
        files = list(_files(folder))
        listed = {name for _, names in files for name in names}
        for path, names in files:
            try:
                found = read_header(path)
            except InputError as error:
                problems += error.problems
                continue
            if lacking := sorted(names - found.keys()):
                problems.append(f"{path}: lacks what {INDEX} says it holds: {', '.join(lacking)}")
            for name, stored in found.items():
                other = self._stored.get(name)
                if other is None or name in names:
                    self._stored[name] = stored
                elif name not in listed:
                    problems.append(
                        f"{path}: holds {name}, and so does {other.path.name}; remove one of them"
                    )
        if problems:
            raise InputError(*problems)

    def __reduce__(self) -> tuple[type[SafetensorsFolder], tuple[Path]]:
        return type(self), (self._folder,)

    def inventory(self) -> Mapping[str, Weight]:
        """Every tensor, by name."""
        return {name: stored.weight for name, stored in self._stored.items()}

    def read(self, name: str) -> Tensor:
        """One of them. InputError where the file fails."""
        stored = self._stored[name]
        # Kinds of float that have no numpy counterpart are read as bytes.
        content = torch.empty(stored.weight.bytes, dtype=torch.uint8)
        try:
            with stored.path.open("rb", buffering=0) as file:
                file.seek(stored.offset)
                view, at = memoryview(content.numpy()), 0
                while at < len(view) and (read := file.readinto(view[at:])):
                    at += read
        except OSError as error:
            raise InputError(f"{stored.path}: {error.strerror}") from None
        if at < len(view):
            raise InputError(f"{stored.path}: ends before {name} does")
        return content.view(stored.weight.dtype).reshape(stored.weight.shape)


def _files(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """The files with weights, and which tensors each must hold at least."""
    if (folder / INDEX).is_file():
        yield from _indexed(folder).items()
    elif os.path.lexists(folder / SINGLE):
        yield folder / SINGLE, set()
    else:
        raise InputError(_why_none(folder))


def _indexed(folder: Path) -> dict[Path, set[str]]:
    index = folder / INDEX
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        names = sorted({str(name) for name in places.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: is not the list of a model's files: {error}") from None
    if outside := [name for name in names if Path(name).name != name]:
        raise InputError(f"{index}: names files that are not in its folder: {', '.join(outside)}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(
            f"{folder}: lacks {len(missing)} of its {len(names)} files, {', '.join(missing)}: the download "
            "was not finished; get these files too"
        )
    return {folder / name: {tensor for tensor, file in places.items() if file == name} for name in names}


def _why_none(folder: Path) -> str:
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        return f"{folder}: lacks {INDEX}, the list of its {len(shards)} safetensors files; get that too"
    if pickled := sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern)):
        return (
            f"{folder}: its weights are pickled ({pickled[0]}), and a pickle can run any program; where you "
            f"trust it, write them as safetensors first: {_SAFE.format(folder=str(folder))}"
        )
    if quantized := sorted(path.name for path in folder.glob("*.gguf")):
        return f"{folder}: holds a GGUF file ({quantized[0]}), made to run only; get the model's safetensors"
    if partial := sorted(path.name for path in folder.rglob("*.incomplete")):
        return f"{folder}: the download was not finished ({partial[0]}); get the files that are missing"
    return (
        f"{folder}: holds no weights, neither {SINGLE} nor {INDEX}; if the model is gated, accept its "
        "terms on its page and log in, and download it again"
    )
