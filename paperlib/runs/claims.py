"""Claims, their criteria and verdicts, and the only place where these become text."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from paperlib.runs.estimate import Estimate


@dataclass(frozen=True)
class Claim:
    """A statement with the criterion that decides it, written down before the run.

    `criterion` is called with the measured quantities by name and says whether the claim holds, `premise` whether the
    run could have decided that; `expected` says both in words. `reading` tells what was measured in a sentence, with
    quantities in braces, see `Estimate`. `exact` claims are mathematics and judged under every preset, the others not
    under `smoke`. Claims that are not the post's are `own`.
    """

    statement: str
    expected: str
    criterion: Callable[..., bool]
    reading: str
    exact: bool = False
    own: bool = False
    premise: Callable[..., bool] = lambda **_: True


def judge(preset: str, claim: Claim, measured: Mapping[str, Estimate]) -> bool | None:
    """Whether `claim` holds for what was `measured`; None where that is not tested."""
    if (preset == "smoke" and not claim.exact) or not claim.premise(**measured):
        return None
    return bool(claim.criterion(**measured))


def decide(preset: str, claims: Mapping[str, Claim], measured: Mapping[str, Mapping[str, Estimate]]) -> "Verdicts":
    """The verdict on each of `claims` for the quantities `measured`, by claim and name."""
    return Verdicts(
        {
            key: {
                "statement": claim.statement,
                "expected": claim.expected,
                "measured": {name: asdict(quantity) for name, quantity in measured[key].items()},
                "holds": judge(preset, claim, measured[key]),
            }
            for key, claim in claims.items()
        }
    )


class Verdicts(dict):
    """The `claims` part of a `metrics.json`: an entry by the key of each claim, shown as a table in a notebook.

    An entry has `statement`, `expected`, `measured` (the fields of an `Estimate` by name) and `holds` (true, false, or
    None where that is not tested).
    """

    def _repr_markdown_(self) -> str:
        header = ("claim", "statement", "expected", "measured", "verdict")
        texts = {key: (e["statement"], e["expected"], measured_text(e), verdict_text(e)) for key, e in self.items()}
        return markdown_table(header, [(key, *cells) for key, cells in texts.items()])

    def __repr__(self) -> str:
        return "\n".join(f"{key}: {verdict_text(entry)} ({measured_text(entry)})" for key, entry in self.items())

    def decided(self) -> dict[str, str]:
        """The verdict of each claim alone."""
        return {key: verdict_text(entry) for key, entry in self.items()}

    def summary(self) -> str:
        """One line: the claims of each verdict, as in "holds: S1 S3; fails: S2"; "-" where there are none."""
        by_verdict: dict[str, list[str]] = {}
        for key, verdict in self.decided().items():
            by_verdict.setdefault(verdict, []).append(key)
        return "; ".join(f"{verdict}: {' '.join(keys)}" for verdict, keys in by_verdict.items()) or "-"


def verdict_text(entry: Mapping[str, Any]) -> str:
    return {True: "holds", False: "fails", None: "not tested"}[entry["holds"]]


def measured_text(entry: Mapping[str, Any]) -> str:
    """All measured quantities of a claim, by name."""
    return "; ".join(f"{name.replace('_', ' ')} {Estimate(**fields)}" for name, fields in entry["measured"].items())


def reading_text(claim: Claim, entry: Mapping[str, Any]) -> str:
    """The `reading` of a claim with what was measured."""
    return claim.reading.format(**{name: Estimate(**fields) for name, fields in entry["measured"].items()})


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars within cells are escaped."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
