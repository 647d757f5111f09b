r"""One page that stands alone, of everything that is recorded, and the notebooks as pages beside it.

    python -m paperlib.report               # writes report/index.html and report/<notebook>.html

No file here needs a network: pictures are embedded, and formulas are MathML, which browsers draw themselves.
"""

import argparse
import base64
import html
import json
import re
from pathlib import Path

from paperlib.report import records, tables
from paperlib.report.records import Recorded
from paperlib.runs.claims import measured_text, verdict_text
from paperlib.system import files

_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)
_CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #222; }
h1, h2, h3 { line-height: 1.2; } img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; }
th, td { border-bottom: 1px solid #ccc; padding: 0.3rem 0.5rem; text-align: left; vertical-align: top; }
.fails { color: #a33c00; font-weight: bold; } .holds { color: #00674a; }
figure { margin: 1.5rem 0; } figcaption { font-size: 0.9rem; color: #444; } code { font-size: 0.9em; }
math[display="block"] { overflow-x: auto; max-width: 100%; }
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m paperlib.report", description=__doc__.split("\n")[0])
    parser.add_argument("--to", type=Path, default=files.ROOT / "report", metavar="FOLDER", help="default report/")
    folder = files.make_folder(parser.parse_args().to.resolve())
    found = list(records.recorded())
    pages = {"index": index(found)}
    pages |= {path.stem: notebook_page(path) for path in sorted(files.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    for name, text in pages.items():
        with files.atomic_write(folder / f"{name}.html") as file:
            file.write_text(text)
    print(folder / "index.html")
    return 0


def index(found: list[Recorded]) -> str:
    """The page of what is recorded, as HTML."""
    parts = [f"<h1>{_escaped(TITLE)}</h1>", _summary(found), "<h2>Claims</h2>", _table(found)]
    for one in found:
        title, link = _escaped(_title(one.notebook)), f'<a href="{one.notebook}.html">The notebook</a>'
        parts += [f'<h2 id="{one.notebook}-{one.preset}">{title} (<code>{one.preset}</code>)</h2>']
        parts += [f"<p>{link}, with the outputs of a run under <code>smoke</code>.</p>"]
        parts += [_figure(one, name, caption) for name, caption in captions(one.notebook).items()]
    parts += ["<h2>Provenance</h2>", *map(_provenance, found)]
    return _document(TITLE, "\n".join(parts))


TITLE = "Towards Deeper Understanding of Variational Autoencoding Models: what came out"


def _summary(found: list[Recorded]) -> str:
    entries = [entry for *_, entry in records.rows(found)]
    holds = sum(entry["holds"] is True for entry in entries)
    fails = [claim for _, claim, entry in records.rows(found) if entry["holds"] is False]
    text = (
        f"The testable statements of the blog post by Song and Zhao on Zhao, Song, Ermon (arXiv 1702.08658), as claims "
        f"with criteria that were written down before the runs. Of {len(entries)} verdicts recorded here {holds} hold "
        f"and {len(fails)} fail ({', '.join(fails) or 'none'}). "
        f"All numbers and figures on this page come from the files under results/ and figures/; "
        f"python -m paperlib.report claims computes the numbers again from the recorded arrays."
    )
    return f"<p>{_escaped(text)}</p>"


def _table(found: list[Recorded]) -> str:
    heads = "".join(f"<th>{head}</th>" for head in ("claim", "expected", "measured", "verdict", "to check it again"))
    lines = []
    for one, claim, entry in records.rows(found):
        verdict, device = verdict_text(entry), _escaped(one.provenance["device"])
        cells = [
            f"<b>{claim}</b> {_escaped(entry['statement'])}",
            re.sub("`([^`]+)`", r"<code>\1</code>", _escaped(entry["expected"])),
            f"{_escaped(measured_text(entry))} (<code>{one.preset}</code>)",
            f'<span class="{verdict.replace(" ", "-")}">{verdict}</span>',
            f"<code>{_escaped(one.command())}</code>, {one.minutes:.0f} minutes on {device}",
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'


def captions(notebook: str) -> dict[str, str]:
    """The figures of a notebook in order, each with the text in italics that follows it, in Markdown."""
    cells = json.loads((files.NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
    found = {}
    for k, cell in enumerate(cells):
        source = "".join(cell["source"])
        for name in tables.FIGURE.findall(source) if cell["cell_type"] == "code" else ():
            after = "".join(cells[k + 1]["source"]) if k + 1 < len(cells) else ""
            caption = re.match(r"\*(.+?)\*(?:\n|$)", after, re.DOTALL)
            found[name] = caption.group(1) if caption and cells[k + 1]["cell_type"] == "markdown" else ""
    return found


def _figure(one: Recorded, name: str, caption: str) -> str:
    path = files.figures_root() / one.preset / f"{name}.png"
    if not path.exists():
        return ""
    picture = base64.b64encode(path.read_bytes()).decode()
    alt = _escaped(re.sub(r"[$\\{}]", "", caption) or name)
    return (
        f'<figure><img alt="{alt}" src="data:image/png;base64,{picture}">'
        f"<figcaption>{markdown(caption)}</figcaption></figure>"
    )


def _provenance(one: Recorded) -> str:
    run = one.provenance
    facts = {
        "origin": one.origin(),
        "started": run["started"],
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "data": json.dumps(run["data"], ensure_ascii=False) if run["data"] else "none",
        "settings": json.dumps(run["settings"], ensure_ascii=False),
        "trainings": "; ".join(f"{name}: {t['steps']} steps, {t['seconds'] / 60:.1f} minutes, {t['revision'][:10]}"
                               for name, t in run["trainings"].items()) or "none",
    }  # fmt: skip
    lines = "".join(f"<tr><th>{name}</th><td>{_escaped(text)}</td></tr>" for name, text in facts.items())
    return f'<h3>{_escaped(_title(one.notebook))}</h3><div class="wide"><table>{lines}</table></div>'


def notebook_page(path: Path) -> str:
    """A committed notebook as HTML."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook, formulas = nbformat.read(path, as_version=4), []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _with_pictures(_held_back(cell.source, formulas), path.parent)
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", embed_images=True)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    text, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    return _with_mathml(re.sub(r'<script[^>]*src="[^"]*"[^>]*></script>', "", text), formulas)


def markdown(text: str) -> str:
    """Markdown with formulas as HTML."""
    import mistune

    formulas: list[str] = []
    render = mistune.create_markdown(escape=False, plugins=["table"])
    return _with_mathml(render(_held_back(text, formulas)), formulas)


def _held_back(text: str, formulas: list[str]) -> str:
    """Markdown with a token for every formula between dollars outside of code; their MathML is added to `formulas`.

    What turns Markdown into HTML would take MathML apart.
    """
    from latex2mathml.converter import convert

    def token(match: re.Match) -> str:
        block, inline = match.groups()
        made = convert(block.strip(), display="block") if block else convert(inline, display="inline")
        formulas.append(made.replace("\n", ""))
        return f"FORMULA{len(formulas) - 1}X"

    pieces = _CODE.split(text)
    return "".join(piece if k % 2 else _MATH.sub(token, piece) for k, piece in enumerate(pieces))


def _with_mathml(text: str, formulas: list[str]) -> str:
    """HTML with the formulas in place of their tokens, but not within tags."""
    put = re.compile(r"<[^>]*>|FORMULA(\d+)X")
    return put.sub(lambda match: formulas[int(match.group(1))] if match.group(1) else match.group(), text)


def _with_pictures(text: str, folder: Path) -> str:
    """Pictures of Markdown, embedded."""

    def embedded(match: re.Match) -> str:
        picture = base64.b64encode((folder / match.group(2)).read_bytes()).decode()
        return f"![{match.group(1)}](data:image/png;base64,{picture})"

    return re.sub(r"!\[([^\]]*)\]\(([^)]+\.png)\)", embedded, text)


def _title(notebook: str) -> str:
    cells = json.loads((files.NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
    return f"{notebook[:2]} {''.join(cells[0]['source']).split(chr(10))[0].lstrip('# ')}"


def _escaped(text: str) -> str:
    return html.escape(text)


def _document(title: str, body: str) -> str:
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{_escaped(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )
