"""Where the optional real data lives; tests that need it skip with a reason when it is absent."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("PPL_ST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def path(relative: str) -> Path:
    """Absolute path of a real data file, or skip the calling test."""
    file = ROOT / relative
    if not file.exists():
        pytest.skip(f"real data absent: {relative} (set PPL_ST_DATA to the folder that holds it)")
    return file
