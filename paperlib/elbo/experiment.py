"""The ELBO seen from the encoder's side, on models where every statement can be computed without sampling."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paperlib.elbo import measurements
from paperlib.elbo.claims import CLAIMS
from paperlib.elbo.section import Section, Table
from paperlib.runs import recorded
from paperlib.runs.claims import Verdicts, decide
from paperlib.runs.estimate import Estimate
from paperlib.runs.experiment import Experiment
from paperlib.runs.presets import check_numbers, option
from paperlib.runs.run import Run, finish, save_arrays


@dataclass(frozen=True)
class Settings:
    """What notebook 01 can be told. Raises `ValueError` for a count below 1."""

    models: int = option(1000, "random finite models (E1, E3, E5)")
    gaussian_models: int = option(100, "random linear-Gaussian models (E2)")
    estimated_models: int = option(8, "random models whose ELBO is estimated by Monte Carlo too (E2)")
    samples: int = option(20_000, "draws of each Monte Carlo estimate (E2)")
    ascent_steps: int = option(3000, "gradient steps of the decoder (E3)")
    starts: int = option(48, "starts of the flows of free tables (E5)")
    flow_steps: int = option(4000, "gradient steps of each flow (E5)")
    chains: int = option(40, "random codes whose Markov chains are enumerated (E6)")
    wrong_decoders: int = option(12, "wrong decoders per code (E6)")

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=())


_random = {"models": 20_000, "gaussian_models": 1000, "estimated_models": 40, "samples": 200_000}
_cpu = Settings(**_random, starts=256, flow_steps=20_000, chains=400, wrong_decoders=100)
PRESETS = {"smoke": Settings(), "cpu": _cpu, "gpu": _cpu, "paper": _cpu}

SECTIONS = {
    "E1": lambda s, stream: measurements.two_views(s.models, stream(1), stream(2)),
    "E2": lambda s, stream: measurements.gaussian_views(s.gaussian_models, s.estimated_models, s.samples, stream(3)),
    "E3": lambda s, stream: measurements.best_decoder(s.models, s.ascent_steps, stream(4), stream(5), stream(6)),
    "E4": lambda s, stream: measurements.factored_gaussians(),
    "E5": lambda s, stream: measurements.indifference(min(s.models, 1000), s.starts, s.flow_steps, stream(7)),
    "E6": lambda s, stream: measurements.markov_chain(s.chains, s.wrong_decoders, stream(8)),
}


def measure(run: Run, claim: str) -> Section:
    """Compute what decides `claim`, "E1" to "E6"; of a recorded run what is recorded."""
    if not run.recorded:
        return SECTIONS[claim](run.settings, run.generator)
    metrics, arrays = recorded.load_recorded_metrics(run), recorded.load_recorded_arrays(run)
    measured = {name: Estimate(**fields) for name, fields in metrics["claims"][claim]["measured"].items()}
    return Section(claim, measured, Table(**metrics["numbers"][claim]), arrays)


def verdict(run: Run, section: Section) -> Verdicts:
    """The verdict of one section alone, to show below its table."""
    return decide(run.preset, {section.claim: CLAIMS[section.claim]}, {section.claim: section.measured})


def conclude(run: Run, *sections: Section) -> Verdicts:
    """Write the arrays, judge all claims and write `metrics.json` and `run.json`. Returns the table of verdicts."""
    if not run.recorded:
        save_arrays(run, **{name: array for section in sections for name, array in section.arrays.items()})
    tables = {section.claim: section.table.as_text() for section in sections}
    return finish(run, CLAIMS, {section.claim: section.measured for section in sections}, tables)


def recompute(run: Run) -> dict[str, Mapping[str, Estimate]]:
    """The quantities of each claim, computed again, which takes a minute."""
    return {claim: SECTIONS[claim](run.settings, run.generator).measured for claim in CLAIMS}


EXPERIMENT = Experiment("01_elbo_derivation", PRESETS, CLAIMS, recompute)


def start(preset: str, seed: int, device: str, overrides: Mapping[str, Any]) -> Run:
    """Open the run that the notebook's parameters ask for; it computes on the CPU whatever `device` says."""
    return EXPERIMENT.start(preset, seed, "cpu", overrides)
