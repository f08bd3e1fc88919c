"""How a table is kept: which options fit, and when a row's time to live is over."""

from __future__ import annotations

from fractions import Fraction

import pyarrow as pa
import pytest

from marble.errors import UsageError
from marble.table_options import DEFAULT_OPTIONS, TTL_US_MAX, TableOptions, check_options, expired_until

TYPES = [pa.timestamp("s"), pa.timestamp("ms"), pa.timestamp("us", "UTC"), pa.timestamp("ns"), pa.date32(), pa.date64()]
SCHEMA = pa.schema([("id", pa.int64()), ("s", pa.string()), *((str(type_), type_) for type_ in TYPES)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TableOptions("zip"), "compression is 'lz4', 'zstd' or None, not 'zip'"),
        (TableOptions(ttl_us=1), "needs a column"),
        (TableOptions(None, "x", 1), "no column 'x'"),
        (TableOptions(None, "s", 1), "cannot live by a string"),
        (TableOptions(None, "id"), "not 0"),
        (TableOptions(None, "id", TTL_US_MAX + 1), "not 9007199254740993"),
        (TableOptions(None, "id", True), "not True"),
    ],
)
def test_what_does_not_fit_is_refused(options: TableOptions, message: str) -> None:
    with pytest.raises(UsageError, match=rf"^table 't'.*{message}"):
        check_options("t", SCHEMA, ["id"], options)


def test_what_fits_is_returned() -> None:
    for options in (DEFAULT_OPTIONS, TableOptions("lz4"), TableOptions("zstd", "id", TTL_US_MAX)):
        assert check_options("t", SCHEMA, ["id"], options) is options
    assert expired_until(SCHEMA, DEFAULT_OPTIONS, 10**15) is None


@pytest.mark.parametrize(
    ("column", "unit_us"),
    [("id", 1), *zip(map(str, TYPES), (10**6, 1000, 1, Fraction(1, 1000), 86_400 * 10**6, 1000), strict=True)],
)
def test_a_row_is_gone_when_its_time_lies_so_far_back(column: str, unit_us: Fraction) -> None:
    options = check_options("t", SCHEMA, ["id"], TableOptions(None, column, 5_000_000))
    for time_us in (0, 1, 4_999_999, 5_000_000, 5_000_001, 10**15, 10**15 + 1):
        until = expired_until(SCHEMA, options, time_us)
        assert until is not None
        # The highest value that lies 5 s back or more, to the microsecond.
        assert until * unit_us <= time_us - 5_000_000 < (until + 1) * unit_us
