"""The page over a run."""

from __future__ import annotations

from pathlib import Path

from kexa.pipeline import Pipeline


def write_report(pipeline: Pipeline) -> Path:
    """Write report.html."""
    return pipeline.out / "report.html"
