"""Status of a process: the active request, its source, and versions."""

from __future__ import annotations

import importlib_metadata
import torch
import wrapt

import lpln_autopatch as lpln
from lpln_autopatch import low_precision_layernorm


def test_status_needs_no_metadata_of_wrapt(monkeypatch):
    """A wrapt that was copied beside a program has none: its version is still there."""
    monkeypatch.setattr(importlib_metadata.Distribution, "discover", lambda **context: iter(()))
    assert lpln.status().versions["wrapt"] == wrapt.__version__


def test_status_shows_a_variable_that_nobody_read(monkeypatch):
    """LPLN_PRECISION that is set while nothing is active is visible in status()."""
    monkeypatch.setenv("LPLN_PRECISION", "amp")
    assert lpln.status().environment == "amp"
    assert lpln.status().precision is None


def test_status_says_what_is_active():
    """status() gives precision, backend, source, installation and versions, readably."""
    assert lpln.status().precision is None
    lpln.enable("bf16")
    status = lpln.status()
    assert (status.precision, status.backend, status.source) == ("amp_bf16", "native", "enable")
    assert status.installed
    assert status.versions["torch"] == torch.__version__
    assert status.versions["lpln_autopatch"] == lpln.__version__
    assert "amp_bf16" in str(status)
    with low_precision_layernorm("amp"):
        assert lpln.status().precision is lpln.Precision.AMP
        assert lpln.status().source == "block"
