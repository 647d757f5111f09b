"""A measured number with its interval: the one type in which numbers are compared, stored and shown."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A number with, where it has one, its 95 % interval [low, high]; nan where it could not be measured.

    In a format string `{name}` is all of it with its unit, `{name:%}` the same in percent, `{name:value}` the number
    alone.
    """

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", math.nan if self.value is None else self.value)  # JSON has null for nan

    @classmethod
    def from_row(cls, row: Sequence[float], unit: str = "") -> "Estimate":
        """Of a row (3,) of arrays: value, low, high."""
        return cls(*map(float, row), unit)

    @property
    def row(self) -> tuple[float, float, float]:
        """Value, low and high, as arrays keep it; the ends are nan where there is no interval."""
        return tuple(math.nan if number is None else number for number in (self.value, self.low, self.high))

    def __format__(self, spec: str) -> str:
        if spec == "value":
            return _short(self.value)
        if spec == "%":
            ends = (None if end is None else 100 * end for end in (self.low, self.high))
            return str(Estimate(100 * self.value, *ends, "%"))
        return format(str(self), spec)

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{_short(self.low)}, {_short(self.high)}]"
        return f"{_short(self.value)}{interval}{' ' * bool(self.unit)}{self.unit}"


def rows(estimates: Iterable[Estimate]) -> np.ndarray:
    """Estimates as an array (n, 3) of value, low, high."""
    return np.array([estimate.row for estimate in estimates])


def _short(value: float) -> str:
    """Three digits, thousands written out."""
    text = f"{value:.3g}"
    return f"{float(text):,.0f}" if 1e3 <= abs(value) < 1e9 else text
