"""A headless Chromium for tests of the report: no network, a profile of its own, and what the page says of itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path
from typing import Any

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed to open the report in")

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=6000", "--force-device-scale-factor=1"),
)
_DARK = {True: "--blink-settings=preferredColorScheme=0", False: "--blink-settings=preferredColorScheme=1"}
# Before anything else runs: what the policy blocks, and what scripts throw.
_WATCH = """<script>
window.seen = { violations: [], errors: [] };
document.addEventListener("securitypolicyviolation", (event) => window.seen.violations.push(event.blockedURI));
window.addEventListener("error", (event) => window.seen.errors.push(event.message));
</script>"""
_TELL = """<script>
window.addEventListener("load", () => setTimeout(async () => {
  const act = async () => { %s };
  let result = null;
  try { result = await act(); } catch (error) { window.seen.errors.push(String(error)); }
  const told = document.createElement("pre");
  told.id = "told";
  const { scrollWidth } = document.documentElement;
  const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
  told.textContent = JSON.stringify({ ...window.seen, loaded, scrollWidth, innerWidth, result });
  document.body.append(told);
}, 500));
</script>"""


def browse(page: Path, act: str = "return null", *, dark: bool = False) -> dict[str, Any]:
    """Open `page` 1280 pixels wide, run the script `act`, and return what it returned as `result`.

    Beside it `violations` (URIs that the page's policy blocked), `errors` of scripts, `loaded` (resources),
    `scrollWidth` and `innerWidth`.
    """
    watched = page.with_name(f"watched-{page.name}")
    head, body = page.read_text().split("</head>", 1)
    policy, rest = head.split("<title>", 1)
    watched.write_text(f"{policy}{_WATCH}<title>{rest}</head>{body.replace('</body>', _TELL % act + '</body>')}")
    dom = _run(watched, "--window-size=1280,900", _DARK[dark], "--dump-dom")
    told = re.search(r'<pre id="told">(.*?)</pre>', dom, re.DOTALL)
    assert told, f"the page did not come to its end: {dom[-2000:]}"
    return dict(json.loads(unescape(told[1])))


def screenshot(page: Path, picture: Path, *, dark: bool, height: int) -> None:
    """A picture of `page`, 1280 pixels wide, at `picture`."""
    _run(page, f"--window-size=1280,{height}", _DARK[dark], f"--screenshot={picture}")
    assert picture.stat().st_size > 0


def _run(page: Path, *flags: str) -> str:
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [PROGRAM, *_FLAGS, f"--user-data-dir={profile}", *flags, page.resolve().as_uri()]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout
