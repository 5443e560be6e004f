"""Which part of the long sweeps runs here, so that they can be spread over machines, or over nights.

`TUNLEDGER_TEST_PART=3/8 tests/run -m full` runs the third of eight parts of each sweep that is marked `full` and has
cases to part; all eight together run every case once. A case belongs to a part by its name, not by its place in the
list, so that it is in exactly one even where two enumerations differ by some places. What a bounded run does is no
matter of this.
"""

import os
import re
import zlib
from collections.abc import Iterable
from typing import TypeVar

VARIABLE = "TUNLEDGER_TEST_PART"

T = TypeVar("T")


def wanted() -> tuple[int, int]:
    """The part, from 1 on, and of how many; (1, 1) where nothing was asked for. Raises ValueError."""
    given = os.environ.get(VARIABLE, "1/1")
    found = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", given)
    if not found or int(found[1]) > int(found[2]):
        raise ValueError(f"{VARIABLE}: {given!r} is no part such as 3/8")
    return int(found[1]), int(found[2])


def part_of(cases: Iterable[T]) -> list[T]:
    """Those of these cases that belong to the part that was asked for, by what they are as text."""
    number, parts = wanted()
    return [case for case in cases if zlib.crc32(str(case).encode()) % parts == number - 1]


def share(total: int) -> int:
    """How many of so many alike that are drawn by chance are this part's."""
    _number, parts = wanted()
    return -(-total // parts)
