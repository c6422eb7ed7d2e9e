"""The picture of the page in the README: a race of the student of the quick start, in Debian's chromium.

    python tests/space/screenshot.py            # writes docs/space.png"""
from __future__ import annotations

import tempfile
from pathlib import Path

from space_server import ROOT, serving
from test_browser import CHROMIUM, sync_api

PICTURE = ROOT / "docs" / "space.png"
RACE = "?__theme=light&student=dmd.emoji-4step&prompt=noto+hospital&seed=0&steps=4"


def photograph(url: str, path: Path):
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{url}/{RACE}")
        page.wait_for_selector("#fs-link", timeout=120_000)
        page.screenshot(path=path, full_page=True)
        browser.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, serving("", Path(folder)) as (url, _):
        photograph(url, PICTURE)
    print(PICTURE)
