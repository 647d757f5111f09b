"""What a section of notebook 01 returns, and the kinds of quantities that it measures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paperlib.runs.claims import markdown_table
from paperlib.runs.estimate import Estimate


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers under a heading; shows itself as Markdown."""

    heading: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def _repr_markdown_(self) -> str:
        heading = [text.replace("|", "\\|") for text in self.heading]
        return markdown_table(heading, [[_cell(value) for value in row] for row in self.rows])

    __repr__ = _repr_markdown_

    def as_text(self) -> dict[str, Any]:
        """Heading and rows as they are shown, for JSON."""
        return {"heading": list(self.heading), "rows": [[_cell(value) for value in row] for row in self.rows]}


@dataclass(frozen=True)
class Section:
    """One section: its claim, the quantities that decide it, a small table to show, arrays to draw."""

    claim: str
    measured: Mapping[str, Estimate]
    table: Table
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


def below(tolerance: float, *residuals: Tensor) -> Estimate:
    """`tolerance` where no residual exceeds it, else the greatest: smaller ones are rounding."""
    greatest = torch.stack([residual.abs().max() for residual in residuals]).max()  # keeps nan
    return Estimate(tolerance if greatest <= tolerance else float(greatest))


def over(values: Tensor) -> Estimate:
    """The greatest of `values`, or 0 where it is below."""
    return Estimate(float(values.max().clamp(min=0)))


def percent(holds: Tensor) -> Estimate:
    return Estimate(100 * float(holds.double().mean()), unit="%")


def nats(value: Tensor | float) -> Estimate:
    return Estimate(float(value), unit="nats")


def numpy(arrays: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in arrays.items()}


def _cell(value: Any) -> str:
    if torch.is_tensor(value) or isinstance(value, float):
        return f"{round(float(value), 3) + 0.0:.3f}"
    return str(value)
