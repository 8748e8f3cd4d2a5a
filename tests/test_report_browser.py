"""The report in a real browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import record_factory as factory

from suite.reports.build import build_report

BROWSER = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="chromium is not installed (apt-get install chromium)"
)

# Runs inside the page and tells the frame around it what it found, which --dump-dom then prints. Headless
# windows are never as narrow as a phone; frames are.
PROBE = """
<script>
const found = {errors: window.problems, figures: 0, flat: [], dead: [], unsorted: [], wide: 0, verdicts: []};
for (const item of document.querySelectorAll("details")) item.open = true;
for (const figure of document.querySelectorAll("figure")) {
  const box = figure.querySelector("svg").getBoundingClientRect();
  found.figures += 1;
  if (box.width < 100 || box.height < 50) found.flat.push(figure.id);
}
for (const link of document.querySelectorAll("a[href^='#']")) {
  const target = link.getAttribute("href").slice(1);
  if (!document.getElementById(target)) found.dead.push(target);
}
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const values = () => [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.v)
      .filter((value) => value !== undefined).map(Number);
    const before = values().length;
    for (const sign of [1, -1]) {
      head.querySelector("button").click();
      const now = values();
      const wrong = now.some((value, index) => index > 0 && sign * (value - now[index - 1]) < 0);
      const name = `${table.caption.textContent}: ${head.textContent}`;
      if (wrong || now.length !== before) found.unsorted.push(name);
    }
  });
}
found.wide = document.documentElement.scrollWidth - innerWidth;
found.first = document.querySelector("main section").id;
for (const mark of document.querySelectorAll(".claims .verdict")) {
  const box = mark.getBoundingClientRect();
  const style = getComputedStyle(mark);
  const look = [box.height, parseFloat(style.fontSize), style.fontWeight];
  if (mark.closest("p") === null) found.verdicts.push(look);
}
parent.postMessage(JSON.stringify(found), "*");
</script>
"""
FRAME = """
<iframe src="{page}" style="width: {width}px; height: 900px; border: 0"></iframe><pre id="probe"></pre>
<script>
addEventListener("message", (event) => document.getElementById("probe").textContent = event.data);
</script>
"""
CATCH = """
<script>window.problems = []; addEventListener("error", (event) => problems.push(event.message));</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(factory.full_report(), tmp_path_factory.mktemp("browser") / "out")


def browse(page: Path, *options: str) -> tuple[str, str]:
    """The page's DOM after its scripts ran, and the browser's log."""
    command = [str(BROWSER), "--headless", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    command += ["--disable-quic", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    command += [f"--user-data-dir={page.parent.parent / 'profile'}", *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    return done.stdout, done.stderr


def probe(page: Path, width: int) -> dict[str, Any]:
    text = page.read_text().replace("<head>", f"<head>{CATCH}").replace("</body>", f"{PROBE}</body>")
    copy, frame = page.parent / f"probe-{width}.html", page.parent / f"frame-{width}.html"
    copy.write_text(text)
    frame.write_text(FRAME.format(page=copy.name, width=width))
    content, _ = browse(frame, f"--window-size={max(width, 500)},900")
    found = re.search(r'<pre id="probe">(.*?)</pre>', content, re.DOTALL)
    assert found, "the page's scripts did not run to their end"
    return json.loads(html.unescape(found[1]))


def test_the_page_opens_without_a_console_message(page: Path):
    content, log = browse(page)
    assert "</html>" in content
    assert not [line for line in log.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [1200, 390])
def test_figures_links_and_sorting_work_on_a_desk_and_on_a_phone(page: Path, width: int):
    found = probe(page, width)
    assert found["errors"] == [] and found["dead"] == []
    assert found["figures"] == page.read_text().count("<figure id=") and found["flat"] == []
    assert found["unsorted"] == []
    assert found["wide"] <= 0, "the page is wider than the window"
    assert found["first"] == "claims"


def test_every_verdict_that_was_reached_is_as_prominent_as_any_other(page: Path):
    looks = {tuple(look) for look in probe(page, 1200)["verdicts"]}
    assert len({(height > 0, size) for height, size, _ in looks}) == 1
    assert {weight for *_, weight in looks} <= {"600", "400"}  # 400: not testable here
