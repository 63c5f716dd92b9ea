"""What is installed is typed: a user's code is checked strictly, and its mistakes are found."""

from __future__ import annotations

import sys
from pathlib import Path

from mypy import api


def test_a_users_code_is_checked(tmp_path: Path) -> None:
    """Right lines pass, and each wrong one is an error: an ignore that nothing needs would be one itself."""
    consumer = Path(__file__).parent / "consumer.py"
    copy = tmp_path / "consumer.py"  # outside the tree, so that only what is installed is found
    copy.write_text(consumer.read_text(encoding="utf-8"), encoding="utf-8")
    limit = sys.getrecursionlimit()
    found, complaints, status = api.run(
        ["--strict", "--config-file=", f"--cache-dir={consumer.parents[2] / '.mypy_cache'}", str(copy)]
    )
    # mypy raises it for the whole process, and other tests are about its end.
    sys.setrecursionlimit(limit)
    assert status == 0, found + complaints
