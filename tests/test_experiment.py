"""What every experiment says of the machines that it is made for."""

import pytest

from paperlib.experiments import EXPERIMENTS

CASES = [(experiment, preset) for experiment in EXPERIMENTS.values() for preset in experiment.presets]
DISTRIBUTED = [(experiment, preset) for experiment, preset in CASES if experiment.fit]
named = {"ids": lambda value: value if isinstance(value, str) else value.notebook}


@pytest.mark.parametrize(("experiment", "preset"), DISTRIBUTED, **named)
def test_every_batch_divides_by_up_to_16_processes(experiment, preset):
    assert experiment.presets[preset].batch_size % 16 == 0
