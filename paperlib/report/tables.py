"""Carry recorded results into the texts that quote them, so that no verdict is typed by hand.

A block stands between `<!-- recorded:begin -->` and `<!-- recorded:end -->`. Notebooks quote the best recorded run of
their own, the README one table of all claims, `docs/speed.md` those of `results/benchmarks/`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paperlib.experiments import EXPERIMENTS
from paperlib.report import records
from paperlib.runs.claims import markdown_table, reading_text, verdict_text
from paperlib.system import files
from paperlib.system.errors import UserError

BEGIN, END = "<!-- recorded:begin -->", "<!-- recorded:end -->"
PASSES = "by full passes (s, extrapolated)"
STDS = (1, 0.1, 0.01)  # of q(z|x), in the benchmark of aggregates
SPEED = "<!-- speed:begin -->", "<!-- speed:end -->"
# The names under which a notebook's cell saves figures.
FIGURE = re.compile(r"save_(?:figure|animation)\(\s*run,.*?\"(\w+)\"\s*\)", re.DOTALL)


def best(notebook: str) -> records.Recorded | None:
    """The best recorded run of a notebook, or None where there is none yet."""
    return next((one for one in records.recorded() if one.notebook == notebook), None)


def notebook_block(notebook: str) -> str:
    """The verdicts of the recorded run of a notebook in one line, as its opening gives them."""
    recorded = best(notebook)
    if recorded is None:
        return "Nothing is recorded for this notebook yet."
    return f"**Recorded** ({recorded.origin()}). Verdicts: {recorded.claims.summary()}; the table is at the end."


def readme_block() -> str:
    """All claims in Markdown, the post's and then ours: what was measured in a sentence, and the verdict."""
    every = [one for one in map(best, EXPERIMENTS) if one is not None]
    header = ("claim", "measured", "verdict", "notebook")
    parts = [_count(every)]
    for title, own in (("**Claims of the post**", False), ("**Our own: corrections and additions**", True)):
        if rows := [row for one in every for row in _claim_rows(one, own)]:
            parts += [title, markdown_table(header, rows)]
    return "\n\n".join([*parts, "  \n".join(f"{one.notebook[:2]}: {one.origin()}." for one in every)])


def _claim_rows(recorded: records.Recorded, own: bool) -> Iterator[tuple[str, str, str, str]]:
    for key, entry in recorded.claims.items():
        claim = recorded.experiment.claims[key]
        if claim.own == own:
            where = f"[{recorded.notebook[:2]}](notebooks/{recorded.notebook}.ipynb)"
            yield f"**{key}** {entry['statement']}", reading_text(claim, entry), verdict_text(entry), where


def _count(every: list[records.Recorded]) -> str:
    verdicts = {exact: [] for exact in (True, False)}
    for one in every:
        for key, entry in one.claims.items():
            verdicts[one.experiment.claims[key].exact].append(verdict_text(entry))
    exact, empirical = verdicts[True], verdicts[False]
    return (
        f"Of {len(exact)} claims that are mathematics {exact.count('holds')} hold. Of {len(empirical)} empirical ones "
        f"{empirical.count('holds')} hold, {empirical.count('fails')} fail and {empirical.count('not tested')} are not "
        "tested."
    )


def speed_block() -> str:
    """What `benchmarks/` measured on the CPU, in Markdown: a few rows of each of its tables."""
    header = ("case", "times as fast", "share of the matrix rate")
    notes = [f"- {name}: {note}." for name in ("sampling", "training") for note in _table(name)["notes"]]
    header_of_stds = ("times as fast, by std of q(z\\|x):", *map(str, STDS), "GiB, at most")
    return "\n\n".join(
        [
            markdown_table(header, [*_sampling_rows(), *_training_rows()]),
            "A share is of the matrix rate of its own precision, as measured beside it:",
            "\n".join(notes),
            markdown_table(header_of_stds, _aggregate_rows()),
        ]
    )


def _sampling_rows() -> Iterator[tuple[str, str, str]]:
    sampling = [row for row in _benchmark("sampling") if row["side"] == 32]
    for row in sampling:
        if row["batch"] in (1, 16, 256):
            size, seconds = row["blocks / filters"], row["ms an image"] / 1000
            passes = min(other[PASSES] for other in sampling if other["blocks / filters"] == size)
            yield (
                f"drawing 32 x 32 pixels, PixelCNN++ {size}, batch {row['batch']}",
                f"{passes / seconds:.0f} (passes at their best batch, extrapolated)",
                f"{row['% of matrix rate']:.0f} %",
            )


def _training_rows() -> Iterator[tuple[str, str, str]]:
    for row in _benchmark("training"):
        yield (
            f"training the {row['network']}, batch {row['batch']}, in {row['precision']}",
            f"{row['times']:.2f} (plain PyTorch)",
            f"{row['% of matrix rate']:.0f} % ({row['% plainly']:.0f} % plainly)",
        )


def _aggregate_rows() -> Iterator[tuple[str, ...]]:
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in _benchmark("aggregates"):
        cases.setdefault(f"{row['quantity']}, {row['dimensions']} dimensions", []).append(row)
    for case, rows in cases.items():
        times = {row["deviation"]: row["times"] for row in rows}
        memory = f"{max(row['GiB'] for row in rows):.1f} (NumPy {max(row['usual (GiB)'] for row in rows):.1f})"
        yield (case, *(f"{times[std]:.{int(times[std] < 10)}f}" for std in STDS), memory)


def _benchmark(name: str) -> list[dict[str, Any]]:
    """The rows of one of the tables, by column."""
    table = _table(name)
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def _table(name: str) -> dict[str, Any]:
    return files.load_json(files.results_root() / "benchmarks" / f"{name}-cpu.json")


def texts() -> Iterator[tuple[Path, str, str]]:
    """Every file with a block, as (path, its text now, its text with the block rewritten)."""
    readme = files.ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    yield readme, text, filled(text, readme_block(), readme)
    speed = files.ROOT / "docs" / "speed.md"
    text = speed.read_text(encoding="utf-8")
    yield speed, text, filled(text, speed_block(), speed, SPEED)
    for name in EXPERIMENTS:
        path = files.NOTEBOOKS / f"{name}.ipynb"
        text = path.read_text(encoding="utf-8")
        notebook = json.loads(text)
        opening = next((cell for cell in notebook["cells"] if BEGIN in "".join(cell["source"])), None)
        if opening is None:
            raise UserError(f"{path} has no line {BEGIN}: put it and {END} into the opening cell")
        source = filled("".join(opening["source"]), notebook_block(name), path)
        opening["source"] = source.splitlines(keepends=True)
        yield path, text, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def filled(text: str, block: str, path: Path, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """`text` with `block` between its marks. Raises `UserError`, naming `path`, where these are not there once."""
    begin, end = marks
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UserError(f"{path} needs one line {begin} and one line {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{block}\n\n{end}{rest.split(end)[1]}"


def update(check: bool = False) -> int:
    """Rewrite what is out of date, or with `check` only name it; the exit code, 1 where a check finds some."""
    stale = [(path, new) for path, old, new in texts() if old != new]
    for path, new in stale:
        if not check:
            with files.atomic_write(path) as file:
                file.write_text(new, encoding="utf-8")
        done = "out of date, run python -m paperlib.report tables" if check else "written"
        print(f"{path.relative_to(files.ROOT)}: {done}")
    return int(check and bool(stale))
