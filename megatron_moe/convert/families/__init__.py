"""The model families of Hugging Face that can be read and written: a file each, and this table of them."""

from __future__ import annotations

from megatron_moe.convert.family import Family

FAMILIES: tuple[Family, ...] = ()
"""In the order in which an export that names none looks for one that fits."""
