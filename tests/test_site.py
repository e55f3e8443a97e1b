"""The documentation site, as `make docs` builds it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from support import ROOT, run_elsewhere

import lpln_autopatch

SITE = Path(os.environ.get("LPLN_TEST_SITE", ""))
pytestmark = run_elsewhere("LPLN_TEST_SITE" not in os.environ, "make docs")


@pytest.mark.parametrize("name", lpln_autopatch.__all__)
def test_public_name_is_on_the_api_page(name):
    """mkdocstrings finds each public name, though it is loaded lazily."""
    assert f'id="lpln_autopatch.{name}"' in (SITE / "api" / "index.html").read_text()


def test_integrations_are_on_the_api_page():
    """The integrations are there too, though their frameworks are not installed."""
    page = (SITE / "api" / "index.html").read_text()
    for path in (ROOT / "lpln_autopatch" / "integrations").glob("*.py"):
        if re.search("^(class|def) LowPrecisionLayerNorm", path.read_text(), re.MULTILINE):
            name = f"lpln_autopatch.integrations.{path.stem}.LowPrecisionLayerNorm"
            assert f'id="{name}"' in page


def test_docstrings_link_the_names_and_pages_that_they_mention():
    """A path of a file is no dead text, and "as for `enable`" is a link to it."""
    page = (SITE / "api" / "index.html").read_text()
    assert not re.findall(r"docs/\w[\w-]*\.md", page)
    assert '<a href="../activation/">Activation</a>' in page
    assert 'As for <a href="#lpln_autopatch.enable"><code>enable</code></a>' in page


def test_readme_is_the_home_page():
    """The README's links to docs/ and to the changelog lead to pages of the site."""
    page = (SITE / "index.html").read_text()
    assert '<a href="numerics/">Numerics</a>' in page
    assert '<a href="CHANGELOG/">changelog</a>' in page


def test_readers_fetch_nothing_from_elsewhere():
    """Fonts, scripts, styles and pictures come from the site itself."""
    for page in SITE.rglob("*.html"):
        assert not re.search(r'(src="|<link [^>]*href=")(https?:)?//', page.read_text()), page
