"""What came of one task or text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_moe.inference.evaluation.statistics import Metric


@dataclass(frozen=True)
class Result:
    """Scores.

    Attributes:
        samples: how many the metrics are over, in words or as a number.
        metrics: by name.
        notes: what a reader must know of them.
        records: one for each sample: what was asked, what was answered, what it scores.
    """

    name: str
    kind: str
    samples: int
    metrics: dict[str, Metric]
    notes: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self, with_records: bool) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "samples": self.samples,
            "metrics": {
                name: {"value": metric.value, "standard_error": metric.error}
                for name, metric in self.metrics.items()
            },
            "notes": self.notes,
        }
        return found | ({"records": self.records} if with_records else {})
