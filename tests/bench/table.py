"""The lines of a table: medians, the middle half, and the ratio of a series to its baseline."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lab

Values = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Row:
    """One line of the table: the ratio of a series to its baseline, or the inverse if ``faster``."""

    text: str
    series: str
    base: str
    target: float | None = None
    faster: bool = False

    def show(self, values: Values) -> str:
        own, base = values[self.series], values[self.base]
        ratio = statistics.median(own) / statistics.median(base)
        measured = f"{spread(base)}  {spread(own)}"
        if self.faster:
            ratio = 1 / ratio
        return line(self.text, measured, ratio, self.target, self.faster, len(own))


def heading(text: str, base: str = "bare", own: str = "kvmd", last: str = "ratio") -> str:
    return f"{text:36} {base:>24}{own:>24}   {last:5}  target            n"


def spread(values: Sequence[float]) -> str:
    """Median, and the middle half."""
    if len(values) == 1:
        return f"{values[0]:7.1f} {'':15}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:7.1f} [{low:6.1f} {high:6.1f}]"


def line(text: str, measured: str, ratio: float, target: float | None, at_least: bool, count: int) -> str:
    goal, verdict = "", ""
    if target is not None:
        goal = f"{'≥' if at_least else '≤'} {target:g}"
        verdict = "met" if (ratio >= target if at_least else ratio <= target) else "MISSED"
    return f"{text:36} {measured:48} {ratio:7.2f}  {goal:6} {verdict:7} {count:3}".rstrip()


def memory(host: lab.Host, daemon: int) -> dict[str, float]:
    """MiB by name, of smaps_rollup."""
    fields = (row.split() for row in host.read(f"/proc/{daemon}/smaps_rollup").splitlines()[1:])
    sizes = {field[0].rstrip(":"): int(field[1]) / 1024 for field in fields}
    return {**sizes, "Private": sizes["Private_Clean"] + sizes["Private_Dirty"]}
