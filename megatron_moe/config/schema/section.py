"""What all sections share: strictness, and the types of their numbers and paths."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
LayerCount = Annotated[int, Field(ge=1, le=10_000)]
ExpertCount = Annotated[int, Field(ge=1, le=100_000)]
RankCount = Annotated[int, Field(ge=1, le=100_000)]
SequenceCount = Annotated[int, Field(ge=1, le=10_000_000)]
PartCount = Annotated[int, Field(ge=1, le=1_000)]
"""Counts of what is written down one by one: beyond these a slip of the keyboard would fill the memory."""
Width = Annotated[int, Field(ge=1, le=1_000_000_000)]
"""Of a matrix: the bytes of a larger one are too many to be counted in 64 bits."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=1e-6, le=1e9)]
Amount = Annotated[float, Field(ge=0, le=1e9)]
"""Figures of machines: times that are made of others would be infinite, or no numbers."""
Share = Annotated[float, Field(ge=1e-6, le=1)]
"""Of a machine's figure that is reached."""
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

InputPath = Annotated[str, Field(min_length=1, json_schema_extra={"path": "input"})]
"""A path that the experiment reads. In a YAML file it is relative to that file, as an override to the working
directory."""


class Section(BaseModel):
    """Strict, frozen, closed to unknown keys; the docstring under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
