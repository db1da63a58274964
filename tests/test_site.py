"""The site builds without a warning and loads nothing from another host."""

import os
import re
import subprocess
import sys

import pytest
from pages import ROOT

pytest.importorskip("material", reason="the site needs the extra `docs`")
pytest.importorskip("mkdocstrings", reason="the site needs the extra `docs`")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    return folder


def test_every_page_of_the_site_stands_by_itself(site):
    pages = [path for path in site.rglob("*.html") if path.name != "404.html"]
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        assert not re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="?https?:', text)
        assert not re.findall(r'<link[^>]*rel="?(?:stylesheet|preconnect)[^>]*href="?https?:', text)


def test_the_api_pages_have_docstrings(site):
    text = (site / "api/optimizer.html").read_text()
    assert "algorithm 1" in text and "set_total_steps" in text
    assert "<code>budget</code>: the most entries" in text  # an argument is an item of a list


def test_links_to_examples_lead_to_their_section(site):
    assert 'href="guide/examples.html#peft_lora"' in (site / "trainers.html").read_text()
    assert 'id="peft_lora"' in (site / "guide/examples.html").read_text()
