"""Runs, the verdicts on their claims, and what is recorded of them."""

import hashlib
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from paperlib.runs import plotting
from paperlib.runs import run as runs
from paperlib.runs.claims import Claim, Verdicts, measured_text
from paperlib.runs.estimate import Estimate
from paperlib.runs.recorded import load_recorded_arrays, load_recorded_weights, record, save_weights
from paperlib.runs.run import finish, load_arrays, save_arrays, save_figure
from paperlib.system import files
from paperlib.system.errors import UserError


@dataclass(frozen=True)
class Settings:
    steps: int = 3
    hidden: tuple[int, ...] = (4, 4)


CLAIMS = {
    "X1": Claim("one", "below 1", lambda size: size.value < 1, ("size",), exact=True),
    "X2": Claim("two", "interval above 0", lambda gap: gap.low > 0, ("gap",)),
}
MEASURED = {"X1": {"size": Estimate(0.5)}, "X2": {"gap": Estimate(2.0, -1.0, 5.0, "nats")}}


@pytest.fixture(autouse=True)
def roots(monkeypatch, tmp_path):
    for name in ("RUNS", "RESULTS", "FIGURES"):
        monkeypatch.setenv(f"PAPERLIB_{name}", str(tmp_path / name.lower()))


def start(preset="cpu", settings=Settings(), seed=0, **options):
    return runs.start("99_test", preset, settings, seed, "cpu", **options)


def test_the_folder_of_a_run_depends_on_settings_and_seed_alone():
    names = {start().name, start().name, start(settings=Settings(hidden=(4, 4))).name}
    assert len(names) == 1
    others = {start(settings=replace(Settings(), steps=4)).name, start(seed=1).name, start(preset="gpu").name}
    assert len(names | others) == 4
    assert start().directory.is_dir()


def test_a_seed_or_weights_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match="seed"):
        start(seed=-1)
    with pytest.raises(UserError, match="seed"):
        start(seed=True)
    with pytest.raises(UserError, match="choose from train, recorded"):
        start(weights="best")


def test_verdicts_come_from_the_criteria_and_only_where_the_preset_may_claim():
    cpu = finish(start(), CLAIMS, MEASURED)
    assert [entry["holds"] for entry in cpu.values()] == [True, False]
    smoke = finish(start("smoke"), CLAIMS, MEASURED)
    assert [entry["holds"] for entry in smoke.values()] == [True, None]
    better = {**MEASURED, "X2": {"gap": Estimate(2.0, 1.0, 5.0)}}
    assert finish(start(), CLAIMS, better)["X2"]["holds"] is True


def test_a_claim_without_its_measurement_is_an_error():
    with pytest.raises(KeyError):
        finish(start(), CLAIMS, {"X1": MEASURED["X1"]})
    with pytest.raises(TypeError):
        finish(start(), CLAIMS, {**MEASURED, "X2": {"wrong": Estimate(1.0)}})


def test_what_could_not_be_measured_is_null_and_holds_nothing():
    run = start()
    shown = finish(run, CLAIMS, {**MEASURED, "X1": {"size": Estimate(float("nan"))}})
    recorded = json.loads((run.directory / "metrics.json").read_text())["claims"]["X1"]
    assert (recorded["measured"]["size"]["value"], recorded["holds"]) == (None, False)
    assert "size nan" in measured_text(recorded)
    assert shown["X1"]["holds"] is False


def test_metrics_and_provenance_are_written_and_plain_json():
    run = start()
    shown = finish(
        run, CLAIMS, MEASURED, numbers={"a": np.float32(1.5), "b": np.arange(2), "c": float("nan"), "d": np.array(0.5)}
    )
    metrics = json.loads((run.directory / "metrics.json").read_text())
    assert metrics["claims"] == dict(shown)
    assert metrics["numbers"] == {"a": 1.5, "b": [0, 1], "c": None, "d": 0.5}
    assert metrics["claims"]["X2"]["measured"]["gap"] == {"value": 2.0, "low": -1.0, "high": 5.0, "unit": "nats"}
    provenance = json.loads((run.directory / "run.json").read_text())
    assert provenance["settings"] == {"steps": 3, "hidden": [4, 4]}
    assert provenance["versions"]["torch"] == torch.__version__


def test_verdicts_as_text():
    entries = finish(
        start(), {**CLAIMS, "X3": replace(CLAIMS["X1"], statement="a | b")}, {**MEASURED, "X3": MEASURED["X1"]}
    )
    assert entries.decided() == {"X1": "holds", "X2": "fails", "X3": "holds"}
    assert entries.summary() == "holds: X1 X3; fails: X2"
    assert Verdicts().summary() == "-"
    assert repr(entries).splitlines()[1] == "X2: fails (gap 2 [-1, 5] nats)"
    assert entries._repr_markdown_().splitlines()[1:] == [
        "| --- | --- | --- | --- | --- |",
        "| X1 | one | below 1 | size 0.5 | holds |",
        "| X2 | two | interval above 0 | gap 2 [-1, 5] nats | fails |",
        "| X3 | a \\| b | below 1 | size 0.5 | holds |",
    ]


def test_arrays_come_back_as_written():
    run = start()
    written = save_arrays(run, a=torch.arange(3), b=np.float64(2.5), c=[[1, 2]])
    for arrays in (written, load_arrays(run.directory)):
        assert {name: array.shape for name, array in arrays.items()} == {"a": (3,), "b": (), "c": (1, 2)}
        assert arrays["b"] == 2.5


def test_figures_and_arrays_are_byte_equal_when_made_again():
    digests = []
    for _ in range(2):
        run = start()
        figure, axis = plotting.new()
        axis.plot([1, 2])
        plotting.show_images(axis, np.ones((3, 4, 4)), columns=2)
        save_figure(run, figure, "plot")
        save_arrays(run, a=np.arange(5))
        digests += [[hashlib.sha256((run.directory / n).read_bytes()).hexdigest() for n in ("plot.png", "arrays.npz")]]
    assert digests[0] == digests[1]


def test_image_grids_keep_one_grey_scale():
    _, axis = plotting.new()
    dim, bright = np.full((2, 2), 0.25), np.full((2, 2), 2.0)
    plotting.show_images(axis, np.stack([dim, bright, dim]), columns=2)
    sheet = axis.images[0].get_array()
    assert sheet.shape == (5, 5)
    assert (sheet[:2, :2] == 0.25).all()
    assert (sheet[:2, 3:] == 1.0).all(), "clipped, not rescaled"
    assert (sheet[:, 2] == 1.0).all(), "the line between two images"
    assert (sheet[3:, 3:] == 1.0).all(), "the empty place of a last row"
    assert axis.images[0].get_clim() == (0, 1)


def test_recorded_weights_are_half_precision_and_bound_to_their_settings():
    run = start()
    state = {"weight": torch.tensor([1.0, 1 / 3]), "count": torch.tensor(7)}
    save_weights(run, state)
    save_arrays(run, a=np.arange(3))
    finish(run, CLAIMS, MEASURED)
    with pytest.raises(UserError, match="nothing is recorded"):
        load_recorded_weights(run)
    target = files.results_root() / "cpu" / "99_test" / "weights.safetensors"
    target.parent.mkdir(parents=True)
    for name in ("run.json", "arrays.npz", "weights.safetensors"):
        (target.parent / name).write_bytes((run.directory / name).read_bytes())
    loaded = load_recorded_weights(run)
    assert loaded["count"] == 7
    assert loaded["weight"].dtype == torch.float32
    assert torch.equal(loaded["weight"], state["weight"].half().float())
    assert load_recorded_arrays(run)["a"].tolist() == [0, 1, 2]
    for other in (start(settings=Settings(steps=9)), start(seed=1)):
        with pytest.raises(UserError, match="other settings or seed 0"):
            load_recorded_weights(other)
        with pytest.raises(UserError, match="other settings or seed 0"):
            load_recorded_arrays(other)
    target.write_bytes(target.read_bytes()[:40])
    with pytest.raises(UserError, match="cannot be read"):
        load_recorded_weights(run)
    arrays = target.with_name("arrays.npz")
    for damaged in (arrays.read_bytes()[:60], b"", b"nonsense"):
        arrays.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            load_recorded_arrays(run)


CLEAN, DIRTY = ({"revision": "abc", "modified": modified} for modified in (False, True))


def finish_by(monkeypatch, run, code=CLEAN, **training):
    monkeypatch.setattr(runs, "describe_code", lambda: code)
    trainings = {"vae": {"steps": 3, "seconds": 1.0, **CLEAN, "resumed": []} | training}
    finish(run, CLAIMS, MEASURED, trainings=trainings)


@pytest.mark.parametrize(
    ("code", "training"),
    [(DIRTY, {}), ({"revision": None, "modified": None}, {}), (CLEAN, DIRTY), (CLEAN, {"resumed": [CLEAN, DIRTY]})],
)
def test_nothing_that_was_made_by_modified_code_is_recorded(monkeypatch, code, training):
    run = start()
    finish_by(monkeypatch, run, code, **training)
    with pytest.raises(UserError, match="not committed"):
        record(run.directory, Settings())
    assert not files.results_root().exists()


def test_only_finished_trainings_of_the_presets_settings_are_recorded(monkeypatch):
    run = start()
    with pytest.raises(UserError, match="not finished"):
        record(run.directory, Settings())
    finish_by(monkeypatch, run)
    with pytest.raises(UserError, match="own settings"):
        record(run.directory, Settings(steps=4))
    other = start(weights="recorded")
    assert other.directory != run.directory, "it must not take the place of the training"
    finish_by(monkeypatch, other)
    with pytest.raises(UserError, match="not a training"):
        record(other.directory, Settings())
    (run.directory / "picture.png").write_bytes(b"png")
    written = {str(path.relative_to(files.results_root().parent)) for path in record(run.directory, Settings())}
    assert written == {"results/cpu/99_test/metrics.json", "results/cpu/99_test/run.json", "figures/cpu/picture.png"}
