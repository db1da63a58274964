"""A headless Chromium for tests of pages: the system's, else the one that `playwright install` brings."""

import contextlib
import shutil
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
HOW = "needs Chromium: apt-get install chromium, or playwright install chromium (CONTRIBUTING.md, Commands)"


@contextlib.contextmanager
def chromium():
    """A browser of playwright. Skips the test where no Chromium exists, and nowhere else."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: extra test")
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        path = next(filter(None, map(shutil.which, NAMES)), own if Path(own).exists() else None)
        if path is None:
            pytest.skip(HOW)
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root needs that
        try:
            yield browser
        finally:
            browser.close()
