"""The table of claims, failed ones first, and every number in it recomputed from what is recorded.

Nothing is trained: the quantities that judge a claim are computed from the recorded arrays by the code as it is now
(those of notebook 01, which trains nothing, from scratch).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from paperlib.experiments import EXPERIMENTS
from paperlib.runs.claims import Verdicts, judge, measured_text, verdict_text
from paperlib.runs.estimate import Estimate
from paperlib.runs.experiment import Experiment
from paperlib.runs.run import Run
from paperlib.system import files
from paperlib.system.errors import UserError

PRESETS = ("paper", "gpu", "cpu", "smoke")  # best first
AGREES = 1e-6  # relative


@dataclass(frozen=True)
class Recorded:
    """What is recorded of one notebook under one preset."""

    notebook: str
    preset: str
    provenance: dict[str, Any]
    claims: Verdicts

    @property
    def experiment(self) -> Experiment:
        return EXPERIMENTS[self.notebook]

    @property
    def minutes(self) -> float:
        """The sum of training times, even of those in parallel; for a notebook that trains nothing, that of the run."""
        trained = sum(training["seconds"] for training in self.provenance["trainings"].values())
        return (trained or self.provenance["seconds"]) / 60

    def command(self) -> str:
        seed = f" SEED={self.provenance['seed']}" if self.provenance["seed"] else ""
        return f"make reproduce PRESET={self.preset} ONLY={self.notebook[:2]}{seed}"

    def origin(self) -> str:
        """Machine, time, seed and revision in one line."""
        run = self.provenance
        what = " of training, all models added up" if run["trainings"] else ""
        trained = {training["revision"][:10] for training in run["trainings"].values()} - {run["revision"][:10]}
        before = "".join(f" (trained at `{revision}`)" for revision in sorted(trained))
        return (
            f"preset `{self.preset}`, {self._seeds()}, {run['device']}, {self.minutes:.1f} minutes{what}, "
            f"torch {run['versions']['torch']}, revision `{run['revision'][:10]}`{before}"
        )

    def _seeds(self) -> str:
        """Where a notebook trains from several seeds, these."""
        settings, first = self.provenance["settings"], self.provenance["seed"]
        if "first_seed" not in settings:
            return f"seed {first}"
        first += settings["first_seed"]
        return f"seeds {first} to {first + settings['seeds'] - 1}"

    def recomputed(self) -> dict[str, dict[str, Estimate]]:
        """The quantities of each claim by the code as it is now.

        Raises `UserError` where files are missing, damaged, or of other settings.
        """
        settings = self.experiment.settings(self.preset)
        run = Run(self.notebook, self.preset, settings, self.provenance["seed"], "cpu", True)
        return self.experiment.recompute(run)


def recorded() -> Iterator[Recorded]:
    """All that is recorded, in the order of notebooks, the best preset of each first."""
    for notebook in EXPERIMENTS:
        for preset in PRESETS:
            folder = files.results_root() / preset / notebook
            if (folder / "run.json").exists():
                metrics, run = (files.load_json(folder / name) for name in ("metrics.json", "run.json"))
                if set(metrics["claims"]) != set(EXPERIMENTS[notebook].claims):
                    raise UserError(f"{folder} has other claims than the code: record notebook {notebook[:2]} again")
                yield Recorded(notebook, preset, run, Verdicts(metrics["claims"]))


def rows(every: list[Recorded]) -> list[tuple[Recorded, str, dict[str, Any]]]:
    """(record, claim, entry) for every claim of every record: failed ones first, else in order."""
    entries = [(one, claim, entry) for one in every for claim, entry in one.claims.items()]
    return sorted(entries, key=lambda row: row[2]["holds"] is not False)


def differences(one: Recorded) -> list[str]:
    """Where the numbers of a record are not those that its arrays give, in words."""
    again, wrong = one.recomputed(), []
    for claim, entry in one.claims.items():
        measured = {name: Estimate(**quantity) for name, quantity in entry["measured"].items()}
        if set(measured) != set(again[claim]):
            wrong.append(f"{claim}: other quantities, {', '.join(sorted(set(measured) ^ set(again[claim])))}")
            continue
        for name, quantity in measured.items():
            if not agree(quantity, again[claim][name]):
                wrong.append(f"{claim}: {name} is recorded as {quantity}, but the arrays give {again[claim][name]}")
        if judge(one.preset, one.experiment.claims[claim], again[claim]) != entry["holds"]:
            wrong.append(f"{claim}: another verdict than {verdict_text(entry)}")
    return wrong


def agree(a: Estimate, b: Estimate) -> bool:
    """Whether two estimates are the same but for rounding, ends of their intervals included."""
    return np.allclose(a.row, b.row, rtol=AGREES, atol=1e-9, equal_nan=True)


def show(only_list: bool = False) -> int:
    """Print all claims and, unless `only_list`, the numbers that differ when computed again; the exit code."""
    every = list(recorded())
    if not every:
        raise UserError(f"nothing is recorded in {files.results_root()}: run in a clone of the repository")
    for one, claim, entry in rows(every):
        print(f"{claim} {verdict_text(entry)} ({one.preset}): {entry['statement']}")
        print(f"   expected  {entry['expected']}")
        print(f"   measured  {measured_text(entry)}")
        print(f"   again     {one.command()}  ({one.minutes:.1f} minutes on {one.provenance['device']})")
    if only_list:
        return 0
    wrong = [text for one in every for text in differences(one)]
    count = sum(len(entry["measured"]) for one in every for entry in one.claims.values())
    print(*wrong, sep="\n")
    print(f"{count} numbers computed again from {len(every)} records: {len(wrong) or 'none'} differ")
    return int(bool(wrong))
