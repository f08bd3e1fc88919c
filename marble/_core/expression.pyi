"""What a filter is and says. Ownership, threads and invariants: head of ``expression.pyx``."""

import pyarrow as pa
import pyarrow.compute as pc

def key_bounds(filter: pc.Expression, key_schema: pa.Schema) -> tuple[bytes, bytes | None] | None:  # noqa: A002
    """Say whether `filter` is a range of keys, and which.

    Parameters
    ----------
    filter
        Over any columns.
    key_schema
        The key columns in key order, as for `marble._core.key_codec.KeyCodec`.

    Returns
    -------
    tuple or None
        ``(lower, upper)``, encoded; no upper bound is None. A row passes `filter` if and only if ``lower <= key < upper``.
        None: the filter says something else, or it is not seen here that it does not: ranges are seen in comparisons of
        integers, texts and bytes with constants of the like, in ``starts_with``, and in these joined by ``&``.

    Raises
    ------
    UsageError
        `key_schema` is not that of a key.
    """

def expression_type(expression: pc.Expression, schema: pa.Schema) -> pa.DataType:
    """Return the type of what `expression` gives for each row of `schema`.

    Raises
    ------
    UsageError
        It does not fit the schema, or is not computed row by row.
    """
