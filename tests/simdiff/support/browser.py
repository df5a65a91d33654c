"""Headless Chromium for tests of pages: how wide a page gets, and what its console says."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the path")

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
    "--hide-scrollbars",
    "--virtual-time-budget=3000",
)

# The page stands in a frame, as a window of Chromium cannot be made as narrow as a phone.
_PROBE = """<!doctype html><meta charset=utf-8><body style="margin:0">
<iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const found = document.querySelector('iframe').contentDocument, root = found.documentElement;
  const wide = [...found.querySelectorAll('main *')].filter(e => {{
    const scrolls = '.scroll, .wide, pre';
    if (e.closest(scrolls + ', .hidden') && !e.matches(scrolls)) return false;
    return e.getBoundingClientRect().right > {width} + 0.5 && !e.closest('svg');
  }}).map(e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40));
  const pictures = [...found.querySelectorAll('svg')];
  const small = pictures.filter(e => e.getBoundingClientRect().width < 200);
  const paper = found.defaultView.getComputedStyle(found.body).backgroundColor;
  const result = document.createElement('pre');
  result.textContent = 'FOUND' + JSON.stringify({{
    scroll: root.scrollWidth, client: root.clientWidth, wide, small: small.length, paper
  }}) + 'END';
  document.body.append(result);
}}</script>"""


def look_at(page: str, width: int, directory: Path, *, dark: bool = False) -> dict[str, Any]:
    """Load a page; returns its widths in pixels, what sticks out, its colours and the console."""
    assert CHROMIUM is not None
    probe = directory / "probe.html"
    probe.write_text(_PROBE.format(width=width, page=html.escape(page, quote=True)), "utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            *_FLAGS,
            f"--user-data-dir={directory / 'profile'}",
            "--window-size=1400,1000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--dump-dom",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    match = re.search("<pre>FOUND(.*?)END</pre>", done.stdout, re.DOTALL)
    assert match is not None, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(html.unescape(match[1])), "console": console}
