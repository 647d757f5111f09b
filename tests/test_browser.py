"""What a reader sees in a real browser: the report, and the notebooks in JupyterLab. Run by `make browser-test`."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from paperlib.report import page
from paperlib.system import files

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: run `make browser-test`")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NOTEBOOKS = sorted(path.stem for path in files.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
PHONE, DESKTOP = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


# The report

# All text of a page that a reader sees, but for code.
TEXT = """() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), texts = [];
  while (walker.nextNode())
    if (!walker.currentNode.parentElement.closest("code, pre, script, style, annotation"))
      texts.push(walker.currentNode.data);
  return texts.join("\\n");
}"""
# Formulas that the browser did not lay out: those without a size, or that are not of the mathematical kind of box.
FLAT = """() => [...document.querySelectorAll("math")].filter(one => {
  const box = one.getBoundingClientRect();
  return !(box.width > 0 && box.height > 0 && getComputedStyle(one).display.includes("math"));
}).length"""
BROKEN = "() => [...document.images].filter(one => !(one.complete && one.naturalWidth > 0)).length"
TOO_WIDE = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return page.write(tmp_path_factory.mktemp("report")).parent


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", ["index", *NOTEBOOKS])
def test_a_page_of_the_report(browser, report, name, size):
    """Formulas are laid out, pictures are there, nothing is fetched, nothing complains, no page is too wide."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, offline=True)
    opened, complaints, asked = context.new_page(), [], []
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto((report / f"{name}.html").as_uri())
    opened.wait_for_load_state("load")
    assert not complaints
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert opened.locator("img").count() > 0 and opened.evaluate(BROKEN) == 0
    assert opened.locator("math").count() > 0 and opened.evaluate(FLAT) == 0
    text = opened.evaluate(TEXT)
    assert "$" not in text and "\\" not in text
    assert opened.evaluate(TOO_WIDE) <= 0
    context.close()


def test_the_index(browser, report):
    """Failed claims come first, every recorded preset has its part, and links lead to the notebooks."""
    opened = browser.new_page()
    opened.goto((report / "index.html").as_uri())
    tables = [table.locator("span.fails, span.holds").all_inner_texts() for table in opened.locator(".claims").all()]
    assert all(verdicts and verdicts == sorted(verdicts) for verdicts in tables)
    assert {"fails", "holds"} <= {verdict for verdicts in tables for verdict in verdicts}
    for metrics in files.results_root().glob("*/*/metrics.json"):
        preset, notebook = metrics.parts[-3:-1]
        assert opened.locator(f'[id="{notebook}-{preset}"]').count() == 1
    assert all(opened.locator(f'a[href="{name}.html"]').count() for name in NOTEBOOKS)
    opened.locator(f'a[href="{NOTEBOOKS[0]}.html"]').first.click()
    assert "ELBO" in opened.title() or opened.locator("h1").first.inner_text()
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_verdicts_and_numbers_of_equations_are_in_sight_on_a_phone(browser, report, scheme):
    context = browser.new_context(viewport={"width": PHONE[0], "height": PHONE[1]}, color_scheme=scheme)
    opened = context.new_page()
    opened.goto((report / "index.html").as_uri())
    boxes = [one.bounding_box() for one in opened.locator(".claims span.fails, .claims span.holds").all()]
    assert boxes and all(box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0] for box in boxes)
    ink, paper = (
        opened.evaluate(f"() => getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert light == sorted(light, reverse=scheme == "dark")
    opened.goto((report / f"{NOTEBOOKS[0]}.html").as_uri())
    for equation in opened.locator(".equation").all():
        formula, number = equation.locator("math").bounding_box(), equation.locator("span").bounding_box()
        assert formula["x"] + formula["width"] <= number["x"] and number["x"] + number["width"] <= PHONE[0]
    context.close()


# JupyterLab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on copies of the notebooks, with runs of its own: (address, folder)."""
    root = tmp_path_factory.mktemp("lab")
    folder = shutil.copytree(files.NOTEBOOKS, root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(files.figures_root(), root / "figures")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True", f"--notebook-dir={root}"]
    settings = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTERLAB_SETTINGS_DIR": "settings"}
    settings |= {"JUPYTERLAB_WORKSPACES_DIR": "workspaces", "JUPYTER_RUNTIME_DIR": "runtime", "PAPERLIB_RUNS": "runs"}
    environment = os.environ | {name: str(root / value) for name, value in settings.items()} | {"OMP_NUM_THREADS": "1"}
    with (root / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"

            def answers():
                assert server.poll() is None, (root / "log").read_text()
                with contextlib.suppress(OSError):
                    return _json(f"{address}/api/status")

            _wait(60, answers)
            yield address, folder
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def run_all(browser, lab, name):
    """Open a notebook, run all of its cells by the menu, and save it: (page, saved notebook)."""
    address, folder = lab
    opened, file = browser.new_page(viewport={"width": 1400, "height": 1000}), folder / f"{name}.ipynb"
    opened.goto(f"{address}/lab/tree/notebooks/{name}.ipynb?reset", timeout=90_000)
    opened.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=90_000)
    _wait(60, lambda: _idle(address))
    for menu, entry in (("Edit", "Clear Outputs of All Cells"), ("Run", "Run All Cells")):
        opened.get_by_role("menuitem", name=menu, exact=True).click()
        opened.get_by_text(entry, exact=True).first.click()

    def done():
        """Idle, and every cell has run or one has failed (between cells, too, the kernel may be idle for a while)."""
        if not _idle(address):
            return False
        before = file.stat().st_mtime_ns
        opened.keyboard.press("Control+s")
        _wait(30, lambda: file.stat().st_mtime_ns != before)
        cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
        failed = any(out["output_type"] == "error" for cell in cells for out in cell["outputs"])
        return failed or all(cell["execution_count"] for cell in cells)

    _wait(240, done)
    return opened, json.loads(file.read_text())


def _idle(address):
    """Whether the one kernel has nothing to do, now and for half a second."""
    for _ in range(5):
        try:
            states = [one["execution_state"] for one in _json(f"{address}/api/kernels")]
        except urllib.error.HTTPError:  # the server's answer while a kernel starts
            return False
        if states != ["idle"]:
            return False
        time.sleep(0.1)
    return True


def _json(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def _wait(seconds, until):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(1)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all_in_jupyterlab(browser, lab, name):
    opened, saved = run_all(browser, lab, name)
    outputs = [out for cell in saved["cells"] if cell["cell_type"] == "code" for out in cell["outputs"]]
    assert [out["evalue"] for out in outputs if out["output_type"] == "error"] == []
    assert [out["text"] for out in outputs if out.get("name") == "stderr"] == []
    assert opened.evaluate(BROKEN) == 0
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 3
    if any("explore(" in "".join(cell["source"]) for cell in saved["cells"]):  # its slider moves the picture
        handle, picture = opened.locator(".noUi-handle").first, opened.locator("img.widget-image").first
        handle.scroll_into_view_if_needed()
        picture.wait_for(timeout=20_000)
        before = picture.get_attribute("src")
        handle.focus()
        for _ in range(20):
            opened.keyboard.press("ArrowRight")
        _wait(30, lambda: picture.get_attribute("src") != before)
    opened.close()
    for session in _json(f"{lab[0]}/api/sessions"):
        request = urllib.request.Request(f"{lab[0]}/api/sessions/{session['id']}", method="DELETE")
        urllib.request.urlopen(request, timeout=30).close()
