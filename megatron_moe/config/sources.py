"""What the sources of a blend are read for, as far as that follows from the YAML alone."""

from __future__ import annotations

from megatron_moe.config.schema import Data, Prepare, Source

PARTS = ("training", "validation", "test")


def sources_of(data: Data) -> dict[str, Source]:
    """The sources by name, in the order of their names. Data that is not blended is one source, called ""."""
    if data.blend is None:
        return {"": Source(path=data.path, prepare=data.prepare)}
    return dict(sorted(data.blend.items()))


def key_of(name: str) -> str:
    """The dotted key of a source's section."""
    return f"data.blend.{name}" if name else "data"


def split_of(data: Data, source: Source | None = None) -> list[float]:
    """[3] the weights of the parts of a source's documents; those of `data` without one."""
    split = data.split if source is None or source.split is None else source.split
    return [*split, *[0.0] * (len(PARTS) - len(split))]


def weights_of(data: Data, source: Source) -> list[float | None]:
    """[3] the source's share of the samples of each part, in proportion to the other sources.

    None: in proportion to its samples times its epochs. 0 where none of its documents are for that part, but
    a list of weights stands as it is.
    """
    if isinstance(source.weight, list):
        return [*source.weight, *[0.0] * (len(PARTS) - len(source.weight))]
    return [source.weight if documents else 0.0 for documents in split_of(data, source)]


def texts_of(data: Data) -> dict[str, Prepare]:
    """The text that is prepared here, by the key of its section."""
    found = {"data.prepare": data.prepare}
    found |= {f"data.blend.{name}.prepare": source.prepare for name, source in (data.blend or {}).items()}
    return {key: section for key, section in found.items() if section is not None}
