"""Runs, the verdicts on their claims, and what is recorded of them."""

import inspect
import json
import subprocess
from dataclasses import asdict, dataclass, replace
from unittest.mock import ANY

import numpy as np
import pytest
import torch

from paperlib.runs import plotting, provenance, recorded
from paperlib.runs import run as runs
from paperlib.runs.claims import Claim, Verdicts, judge, measured_text, reading_text
from paperlib.runs.estimate import Estimate
from paperlib.runs.experiment import Experiment
from paperlib.runs.recorded import load_recorded_arrays, load_recorded_weights, record, save_weights
from paperlib.runs.run import load_arrays, save_arrays, save_figure
from paperlib.system import files
from paperlib.system.errors import UserError


@dataclass(frozen=True)
class Settings:
    steps: int = 3
    hidden: tuple[int, ...] = (4, 4)


CLAIMS = {
    "X1": Claim("one", "below 1", lambda size: size.value < 1, "{size:%} of it", exact=True),
    "X2": Claim("two", "interval above 0", lambda gap: gap.low > 0, "a gap of {gap}"),
}
MEASURED = {"X1": {"size": Estimate(0.5)}, "X2": {"gap": Estimate(2.0, -1.0, 5.0, "nats")}}
CLEAN, DIRTY = ({"revision": "abc", "modified": modified} for modified in (False, True))


@pytest.fixture(autouse=True)
def roots(monkeypatch, tmp_path):
    for name in ("RUNS", "RESULTS", "FIGURES"):
        monkeypatch.setenv(f"PAPERLIB_{name}", str(tmp_path / name.lower()))
    monkeypatch.setattr(runs, "describe_code", lambda: CLEAN)


def start(preset="cpu", settings=Settings(), seed=0, **options):
    return runs.start("99_test", preset, settings, seed, "cpu", **options)


def finish(run, measured=MEASURED, **options):
    """The verdicts of a run, and what `metrics.json` and `run.json` hold."""
    verdicts = runs.finish(run, CLAIMS, measured, **options)
    return verdicts, *(json.loads((run.directory / name).read_text()) for name in ("metrics.json", "run.json"))


def test_the_folder_of_a_run_depends_on_settings_and_seed_alone():
    assert start().name == start(settings=Settings(hidden=(4, 4))).name and start().directory.is_dir()
    others = (start(settings=Settings(steps=4)), start(seed=1), start("gpu"), start(recorded=True))
    assert len({run.name for run in (start(), *others)}) == 5
    for mistaken in (-1, True):
        with pytest.raises(UserError, match="but takes a whole number"):
            start(seed=mistaken)


def test_verdicts_come_from_the_criteria_and_only_where_the_preset_may_claim():
    above = MEASURED | {"X2": {"gap": Estimate(2.0, 1.0, 5.0)}}
    unknown = MEASURED | {"X1": {"size": Estimate(float("nan"))}}
    cases = [("cpu", MEASURED, [True, False]), ("smoke", MEASURED, [True, None]), ("cpu", above, [True, True])]
    for preset, measured, holds in [*cases, ("cpu", unknown, [False, False])]:
        verdicts, metrics, _ = finish(start(preset), measured)
        assert [entry["holds"] for entry in verdicts.values()] == holds
    unmeasured = metrics["claims"]["X1"]
    assert unmeasured["measured"]["size"]["value"] is None and "size nan" in measured_text(unmeasured)
    for wrong in ({"X1": MEASURED["X1"]}, MEASURED | {"X2": {"wrong": Estimate(1.0)}}):
        with pytest.raises((KeyError, TypeError)):
            finish(start(), wrong)


def test_a_claim_whose_premise_is_not_met_is_not_tested():
    claim = Claim("one", "", lambda size: size.value < 1, "", premise=lambda size: size.value > 0, exact=True)
    holds = [judge("cpu", claim, {"size": Estimate(size)}) for size in (-1.0, 0.5, 2.0)]
    assert holds == [None, True, False]


def test_a_reading_has_the_numbers_in_it():
    claim = Claim("one", "", bool, "{size} or {size:value}, that is {size:%}, of {all:value}")
    measured = {"size": asdict(Estimate(0.5, 0.4, 0.6, "nats")), "all": asdict(Estimate(2000.0))}
    assert reading_text(claim, {"measured": measured}) == "0.5 [0.4, 0.6] nats or 0.5, that is 50 [40, 60] %, of 2,000"


def typed(text):
    """A function as an interactive session makes it, whose source Python cannot show."""
    names = {}
    exec(text, names)  # noqa: S102
    return names["f"]


def test_a_function_that_python_cannot_show_counts_by_what_it_does():
    texts = "f = lambda x: x - 20", "f = lambda x: x - 30", "f = lambda x: x + 20"
    nested = [f"def f(x):\n    return [abs(y - {k}) for y in x]" for k in (20, 30)]
    captured = [f"def make(k):\n    return lambda x: x - k\nf = make({k})" for k in (20, 30)]
    hashes = [provenance.source_hash([typed(text)]) for text in (*texts, *nested, *captured)]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == provenance.source_hash([typed("# a comment\nf = lambda x: x - 20")])


@pytest.mark.parametrize("module", ["paperlib.nn.likelihoods", "paperlib.nn.pixelcnn", "paperlib.runs.train"])
def test_a_density_counts_where_an_objective_imports_it(module, monkeypatch):
    from paperlib.pixelvae.training import evaluate

    source, before = inspect.getsource, provenance.source_hash([evaluate])
    assert before == provenance.source_hash([evaluate])
    monkeypatch.setattr(
        inspect, "getsource", lambda one: source(one) + "\nnew = 1" * (getattr(one, "__name__", "") == module)
    )
    assert (provenance.source_hash([evaluate]) != before) == module.startswith("paperlib.nn")


def test_metrics_and_provenance_are_written_and_plain_json(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package"))
    numbers = {"a": np.float32(1.5), "b": np.arange(2), "c": float("nan"), "d": np.array(0.5)}
    verdicts, metrics, origin = finish(start(), numbers=numbers)
    assert metrics["claims"] == dict(verdicts)
    assert metrics["numbers"] == {"a": 1.5, "b": [0, 1], "c": None, "d": 0.5}
    assert metrics["claims"]["X2"]["measured"]["gap"] == {"value": 2.0, "low": -1.0, "high": 5.0, "unit": "nats"}
    assert origin["settings"] == {"steps": 3, "hidden": [4, 4]}
    assert origin["versions"] == {"python": ANY, "numpy": np.__version__, "no-such-package": "not installed"}


def test_verdicts_as_text():
    entries, *_ = finish(start())
    entries["X3"] = entries["X1"] | {"statement": "a | b"}
    assert entries.summary() == "holds: X1 X3; fails: X2" and Verdicts().summary() == "-"
    assert repr(entries).splitlines()[1] == "X2: fails (gap 2 [-1, 5] nats)"
    assert entries._repr_markdown_().splitlines()[1:] == [
        "| --- | --- | --- | --- | --- |",
        "| X1 | one | below 1 | size 0.5 | holds |",
        "| X2 | two | interval above 0 | gap 2 [-1, 5] nats | fails |",
        "| X3 | a \\| b | below 1 | size 0.5 | holds |",
    ]


def test_the_revision_is_that_of_our_own_repository(tmp_path, monkeypatch):
    """A copy of the project that lies in somebody else's repository has none, in ours it has."""

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "paperlib").mkdir()
    (tmp_path / "paperlib" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(files, "ROOT", tmp_path / "paperlib")
    assert provenance.describe_code() == {"revision": None, "modified": None}
    monkeypatch.setattr(files, "ROOT", tmp_path)
    code = provenance.describe_code()
    assert len(code["revision"]) == 40 and not code["modified"]
    (tmp_path / "paperlib" / "a.py").write_text("2")
    assert provenance.describe_code() == code | {"modified": True}


def test_figures_and_arrays_are_byte_equal_when_made_again_and_arrays_as_written():
    made = []
    for _ in range(2):
        run = start()
        figure, axis = plotting.new()
        axis.plot([1, 2])
        save_figure(run, figure, "plot")
        written = save_arrays(run, a=torch.arange(3), b=np.float64(2.5), c=[[1, 2]])
        made.append([(run.directory / name).read_bytes() for name in ("plot.png", "arrays.npz")])
    assert made[0] == made[1]
    for arrays in (written, load_arrays(run.directory)):
        assert {name: array.tolist() for name, array in arrays.items()} == {"a": [0, 1, 2], "b": 2.5, "c": [[1, 2]]}


def test_image_grids_keep_one_grey_scale():
    _, axis = plotting.new()
    dim, bright = np.full((2, 2), 0.25), np.full((2, 2), 2.0)
    plotting.show_images(axis, np.stack([dim, bright, dim]), columns=2)
    white = np.ones((5, 5))  # values above 1, the lines between images, and the empty place of a last row
    white[:2, :2] = white[3:, :2] = 0.25
    np.testing.assert_array_equal(axis.images[0].get_array(), white)
    assert axis.images[0].get_clim() == (0, 1)


@pytest.mark.parametrize(
    ("code", "training"),
    [(DIRTY, {}), ({"revision": None, "modified": None}, {}), (CLEAN, DIRTY), (CLEAN, {"resumed": [CLEAN, DIRTY]})],
)
def test_nothing_that_was_made_by_modified_code_is_recorded(monkeypatch, code, training):
    run = start()
    monkeypatch.setattr(runs, "describe_code", lambda: code)
    finish(run, trainings={"vae": {"steps": 3, "seconds": 1.0, **CLEAN, "resumed": []} | training})
    with pytest.raises(UserError, match="not committed"):
        record(run.directory, Settings())
    assert not files.results_root().exists()


def test_only_finished_trainings_of_the_preset_s_settings_are_recorded():
    run, other = start(), start(recorded=True)
    with pytest.raises(UserError, match="not finished"):
        record(run.directory, Settings())
    finish(run)
    finish(other)
    for directory, settings in ((run.directory, Settings(steps=4)), (other.directory, Settings())):
        with pytest.raises(UserError, match="not a training with the preset's own settings"):
            record(directory, settings)
    (run.directory / "picture.png").write_bytes(b"png")
    written = {str(path.relative_to(files.results_root().parent)) for path in record(run.directory, Settings())}
    assert written == {"results/cpu/99_test/metrics.json", "results/cpu/99_test/run.json", "figures/cpu/picture.png"}


def test_what_is_recorded_comes_back_in_half_precision_and_for_its_settings_alone():
    run = start()
    state = {"weight": torch.tensor([1.0, 1 / 3]), "count": torch.tensor(7)}
    save_weights(run, state)
    save_arrays(run, a=np.arange(3))
    finish(run)
    with pytest.raises(UserError, match="nothing is recorded"):
        load_recorded_weights(run)
    record(run.directory, Settings())
    loaded = load_recorded_weights(run)
    assert loaded["count"] == 7 and loaded["weight"].dtype == torch.float32
    assert torch.equal(loaded["weight"], state["weight"].half().float())
    assert load_recorded_arrays(run)["a"].tolist() == [0, 1, 2]
    assert recorded.load_recorded_metrics(start(seed=1))["claims"]["X1"]["holds"] is True
    for load in (load_recorded_weights, load_recorded_arrays, recorded.load_recorded_metrics):
        with pytest.raises(UserError, match="recorded with other settings than preset cpu has now"):
            load(start(settings=replace(Settings(), steps=9)))
    for load, name in ((load_recorded_weights, "weights.safetensors"), (load_recorded_arrays, "arrays.npz")):
        file = files.results_root() / "cpu" / "99_test" / name
        for damaged in (file.read_bytes()[:40], b"", b"nonsense"):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match="cannot be read"):
                load(run)


def test_the_preset_recorded_opens_the_best_recorded_run_and_takes_no_overrides():
    rising = {"smoke": Settings(), "cpu": Settings(steps=5), "gpu": Settings(steps=7)}
    experiment = Experiment("99_test", rising, CLAIMS, lambda run: MEASURED)
    with pytest.raises(UserError, match="nothing is recorded of 99_test"):
        experiment.start()
    for preset in ("cpu", "smoke"):
        run = start(preset, rising[preset])
        finish(run)
        record(run.directory, rising[preset])
    opened = experiment.start(seed=3, device="cpu")
    assert (opened.preset, opened.settings, opened.seed, opened.recorded) == ("cpu", rising["cpu"], 3, True)
    assert opened.name == experiment.run_name("recorded", 3, {}) == "99_test/recorded"
    assert experiment.start("cpu", device="cpu").recorded is False
    for preset, overrides, message in (
        ("recorded", {"steps": 3}, "recorded trains nothing: drop overrides"),
        ("cqu", {}, "unknown preset 'cqu': choose from recorded, smoke, cpu, gpu"),
    ):
        with pytest.raises(UserError, match=message):
            experiment.start(preset, overrides=overrides)
