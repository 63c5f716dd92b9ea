"""What every recipe's folder has in common."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from guardmw.errors import GuardmwError
from guardmw.train import stages

if TYPE_CHECKING:
    from pathlib import Path


def test_a_full_disk_is_told_of_with_what_to_do(tmp_path: Path) -> None:
    """Wherever in a stage it fills up; other faults stay what they are."""
    full, other = (OSError(number, "told by the system") for number in (errno.ENOSPC, errno.EACCES))
    with pytest.raises(GuardmwError, match="make room, and run the same command again"), stages.log(tmp_path):
        raise full
    with pytest.raises(OSError, match="told by the system") as caught, stages.log(tmp_path):
        raise other
    assert caught.value is other


def test_a_disk_too_full_for_the_log_is_told_of_as_well(tmp_path: Path) -> None:
    """Closing the file tries to write once more, and fails once more."""
    (tmp_path / stages.LOG).symlink_to("/dev/full")
    with pytest.raises(GuardmwError, match="make room"), stages.log(tmp_path) as say:
        say("a line")
