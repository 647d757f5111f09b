r"""One page that stands alone, of everything that is recorded, and the notebooks as pages beside it.

No file here needs a network: pictures are embedded, and formulas are MathML, which browsers draw themselves.
"""

import base64
import json
import re
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from paperlib.report import records, tables
from paperlib.report.records import Recorded
from paperlib.runs.claims import measured_text, verdict_text
from paperlib.system import files

TITLE = "Towards Deeper Understanding of Variational Autoencoding Models: what came out"
TEMPLATES = PackageLoader("paperlib.report")
_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)
_TAG = re.compile(r"\\tag\{([^}]*)\}")
_CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)


def write(folder: Path) -> Path:
    """Write `index.html` and a page for each notebook into `folder`; the path of the first."""
    files.make_folder(folder)
    pages = {"index": index(list(records.recorded()))}
    pages |= {path.stem: notebook_page(path) for path in sorted(files.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    for name, text in pages.items():
        with files.atomic_write(folder / f"{name}.html") as file:
            file.write_text(text, encoding="utf-8")
    return folder / "index.html"


def index(every: list[Recorded]) -> str:
    """The page of what is recorded, as HTML."""
    templates = Environment(loader=TEMPLATES, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    templates.filters |= {"title_of": _title, "figures": _figures, "facts": _facts}
    templates.filters |= {"verdict": verdict_text, "measured": measured_text, "rows": lambda one: records.rows([one])}
    rows = records.rows(every)
    return templates.get_template("index.html.j2").render(
        title=TITLE,
        records=every,
        verdicts=rows,
        held=sum(entry["holds"] is True for *_, entry in rows),
        failed=[claim for _, claim, entry in rows if entry["holds"] is False],
    )


def captions(notebook: str) -> dict[str, str]:
    """The figures of a notebook in order, each with the text in italics that follows it, in Markdown."""
    cells = json.loads((files.NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = {}
    for k, cell in enumerate(cells):
        source = "".join(cell["source"])
        for name in tables.FIGURE.findall(source) if cell["cell_type"] == "code" else ():
            after = "".join(cells[k + 1]["source"]) if k + 1 < len(cells) else ""
            caption = re.match(r"\*(.+?)\*(?:\n|$)", after, re.DOTALL)
            texts[name] = caption.group(1) if caption and cells[k + 1]["cell_type"] == "markdown" else ""
    return texts


def _figures(one: Recorded) -> list[dict[str, str]]:
    """The recorded figures of a notebook in order: `png` in base64, `alt` as plain text, `caption` as HTML."""
    figures = []
    for name, caption in captions(one.notebook).items():
        path = files.figures_root() / one.preset / f"{name}.png"
        if path.exists():
            alt = re.sub(r"[$\\{}]", "", caption) or name
            figures.append({"png": _base64(path), "alt": alt, "caption": markdown(caption)})
    return figures


def _facts(one: Recorded) -> dict[str, str]:
    """Where a record comes from, in words."""
    run = one.provenance
    trainings = (
        f"{name}: {training['steps']} steps, {training['seconds'] / 60:.1f} minutes, {training['revision'][:10]}"
        for name, training in run["trainings"].items()
    )
    return {
        "origin": one.origin(),
        "started": run["started"],
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "data": json.dumps(run["data"], ensure_ascii=False) if run["data"] else "none",
        "settings": json.dumps(run["settings"], ensure_ascii=False),
        "trainings": "; ".join(trainings) or "none",
    }


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
    text = re.sub(r'<script[^>]*src="[^"]*"[^>]*></script>', "", text)
    style, _, _ = TEMPLATES.get_source(Environment(autoescape=True), "style.css")
    return _with_mathml(text.replace("</head>", f"<style>\n{style}</style>\n</head>", 1), formulas)


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
        made = convert(_TAG.sub("", block or inline).strip(), display="block" if block else "inline")
        if block:  # the number beside the formula, where it stays in sight when a wide one is moved
            number = "".join(f"<span>({tag})</span>" for tag in _TAG.findall(block))
            made = f'<span class="equation">{made}{number}</span>'
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
        return f"{match.group(1)}(data:image/png;base64,{_base64(folder / match.group(2))})"

    return re.sub(r"(!\[[^\]]*\])\(([^)]+\.png)\)", embedded, text)


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _title(notebook: str) -> str:
    cells = json.loads((files.NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    return f"{notebook[:2]} {''.join(cells[0]['source']).split(chr(10))[0].lstrip('# ')}"
