"""The report in a browser: on a phone and a desktop nothing sticks out, is cut off, or complains."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusedres.cli import main
from fusedres.cli.report.style import DARK

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, BROWSERS) if path), None)
# what sticks out to the right of the window, and text that its figure cuts off
PROBE = """<script>
const right = element => element.getBoundingClientRect().right;
const all = (within, what) => [...within.querySelectorAll(what)];
const shown = text => text.getBoundingClientRect().width > 0;
document.body.dataset.probe = JSON.stringify({
  inner: innerWidth,
  scroll: document.documentElement.scrollWidth,
  wide: all(document, 'main > *, figure, svg').filter(e => right(e) > innerWidth).map(e => e.tagName + e.id),
  clipped: all(document, 'svg').flatMap(svg =>
    all(svg, 'text').filter(t => shown(t) && right(t) > right(svg) + 2).map(t => t.textContent)),
  dark: matchMedia('(prefers-color-scheme: dark)').matches,
  page: getComputedStyle(document.body).backgroundColor,
});
</script>"""
FRAMES = """<!doctype html><link rel="icon" href="data:,"><body style="margin:0">
<iframe style="width:390px;height:800px;border:0" src="PAGE"></iframe>
<iframe style="width:1280px;height:800px;border:0" src="PAGE"></iframe><script>
onload = () => { document.body.dataset.found =
  JSON.stringify([0, 1].map(index => frames[index].document.body.dataset.probe)); };
</script>"""


@pytest.fixture(scope="module")
def framed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page with a probe, in a frame as wide as a phone: a window of a desktop is wider."""
    folder = tmp_path_factory.mktemp("browser")
    main(["report", str(RESULTS), "--out", str(folder / "report.html")])
    text = (folder / "report.html").read_text().replace("<details>", "<details open>")
    (folder / "probed.html").write_text(text.replace("</body>", f"{PROBE}</body>"))
    yield folder / "probed.html"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_in_a_browser(framed, tmp_path):
    """A phone and a desktop, in the dark: nothing sticks out, is cut off, or complains."""
    page = framed.with_name("frames.html")
    page.write_text(FRAMES.replace("PAGE", framed.name))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--window-size=1400,900"]
    command += ["--blink-settings=preferredColorScheme=0", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    probes = [json.loads(probe) for probe in json.loads(found[1].replace("&quot;", '"'))]
    assert [probe["inner"] for probe in probes] == [390, 1280]
    rgb = ", ".join(str(int(DARK["page"][i : i + 2], 16)) for i in (1, 3, 5))
    for probe in probes:
        assert probe["scroll"] <= probe["inner"] and probe["wide"] == [] and probe["clipped"] == []
        assert probe["dark"] and probe["page"] == f"rgb({rgb})"
    assert "CONSOLE" not in done.stderr
