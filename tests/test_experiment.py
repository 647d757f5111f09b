"""What every experiment says of the machines that it is made for."""

import pytest
import torch

from paperlib.experiments import EXPERIMENTS
from paperlib.system.errors import UserError

CASES = [(experiment, preset) for experiment in EXPERIMENTS.values() for preset in experiment.presets]
DISTRIBUTED = [(experiment, preset) for experiment, preset in CASES if experiment.fit]
named = {"ids": lambda value: value if isinstance(value, str) else value.notebook}


@pytest.mark.parametrize(("experiment", "preset"), DISTRIBUTED, **named)
def test_every_batch_divides_by_up_to_16_processes(experiment, preset):
    assert experiment.presets[preset].batch_size % 16 == 0


@pytest.mark.parametrize(("experiment", "preset"), CASES, **named)
def test_a_preset_made_for_cuda_runs_on_the_cpu_only_where_that_is_asked_for(experiment, preset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert experiment.device(preset, "cpu") == torch.device("cpu")
    if preset in ("gpu", "paper") and experiment.presets[preset] != experiment.presets["cpu"]:
        with pytest.raises(UserError, match=f"preset '{preset}' is made for CUDA, .* with device cpu"):
            experiment.start(preset)
    else:
        assert experiment.device(preset, "auto") == torch.device("cpu")
