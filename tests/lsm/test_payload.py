"""Payloads: what is encoded comes back; what nobody vouches for is refused, alike on every replica."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from marble._core.entry_batch import encode_payload
from marble.errors import UsageError
from marble.lsm import payload
from marble.schema import TableInfo, check_table
from marble.table_options import TableOptions

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("name", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("more", pa.struct([pa.field("x", pa.int8(), nullable=False)])),
    ]
)
TABLE = TableInfo(3, "t", *check_table("t", SCHEMA, ["name", "id"]))
ROWS = pa.RecordBatch.from_pylist(
    [
        {"id": 1, "name": "a", "tags": ["x", None], "more": {"x": 1}},
        {"id": 2, "name": "b", "tags": None, "more": None},
        {"id": 3, "name": "", "tags": [], "more": {"x": -1}},
    ],
    SCHEMA,
)


def test_rows_come_back_in_place() -> None:
    data = payload.encode_rows(ROWS)
    decoded = payload.decode_rows(data, TABLE)
    assert decoded.equals(ROWS)
    assert decoded.schema == TABLE.schema
    assert data.address <= decoded.column("id").buffers()[1].address < data.address + data.size


def test_keys_come_back() -> None:
    keys = ROWS.select(["name", "id"])
    assert payload.decode_keys(payload.encode_rows(keys), TABLE).equals(keys)


def test_create_table_comes_back() -> None:
    schema = SCHEMA.with_metadata({"a": "b"})
    name, decoded, key, options = payload.decode_create_table(payload.encode_create_table("t", schema, ["name", "id"]))
    assert (name, key, options) == ("t", ("name", "id"), TableOptions())
    assert decoded.equals(SCHEMA)
    assert decoded.metadata is None


def test_options_come_back() -> None:
    options = TableOptions("zstd", "id", 7, False, (("name", "max"),))
    assert payload.decode_create_table(payload.encode_create_table("t", SCHEMA, ["id"], options))[3] == options


def test_drop_table_and_command_come_back() -> None:
    assert payload.decode_drop_table(payload.encode_drop_table("t")) == "t"
    for operation in (b"", b"\0\xff" * 1000):
        assert payload.decode_command(payload.encode_command(operation)) == operation


def test_names_are_checked_before_they_are_sent() -> None:
    with pytest.raises(UsageError, match="cannot be the name of a table"):
        payload.encode_drop_table("../x")
    with pytest.raises(UsageError, match="cannot be the name of a table"):
        payload.encode_create_table("../x", SCHEMA, ["id"])


def test_entry_size() -> None:
    data = payload.encode_rows(ROWS)
    payload.check_entry_size(data, data.size, "the batch")
    with pytest.raises(UsageError, match=f"the batch takes {data.size} bytes in the log, above max_entry_size"):
        payload.check_entry_size(data, data.size - 1, "the batch")


def create(
    name: str | None = "t",
    schema: bytes | None = None,
    key: list[str | None] | None = None,
    compression: str | None = "",
    ttl_column: str = "",
    ttl_us: int = 0,
    ttl_stamped: bool = False,
    merge: list[tuple[str | None, str]] | None = None,
) -> pa.Buffer:
    """The payload of a CREATE_TABLE by a proposer that checks nothing."""
    loose = pa.schema(
        [
            ("name", pa.string()),
            ("schema", pa.binary()),
            ("key", pa.list_(pa.string())),
            ("compression", pa.string()),
            ("ttl_column", pa.string()),
            ("ttl_us", pa.int64()),
            ("ttl_stamped", pa.bool_()),
            ("merge_columns", pa.list_(pa.string())),
            ("merge_operators", pa.list_(pa.string())),
        ]
    )
    row = {
        "name": name,
        "schema": schema or SCHEMA.serialize().to_pybytes(),
        "key": key or ["id"],
        "compression": compression,
        "ttl_column": ttl_column,
        "ttl_us": ttl_us,
        "ttl_stamped": ttl_stamped,
        "merge_columns": [column for column, _ in merge or []],
        "merge_operators": [operator for _, operator in merge or []],
    }
    return encode_payload(pa.RecordBatch.from_pylist([row], loose))


def test_create_without_checks_is_well_formed() -> None:
    assert payload.decode_create_table(create()) == ("t", SCHEMA, ("id",), TableOptions())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (create(name="../x"), "cannot be the name of a table"),
        (create(name=None), "one row without nulls"),
        (create(key=["nope"]), "'nope' is not in the schema"),
        (create(key=[None]), "one row without nulls"),
        (create(key=["tags"]), "cannot be in the key"),
        (create(schema=b"garbage"), "not an Arrow IPC schema message"),
        (create(schema=SCHEMA.serialize().to_pybytes()[:-9]), "not an Arrow IPC schema message"),
        (create(schema=encode_payload(ROWS).to_pybytes()), "not an Arrow IPC schema message"),
        (create(schema=pa.schema([("id", pa.int8()), ("u", pa.uuid())]).serialize().to_pybytes()), "extension types"),
        (create(schema=pa.schema([("id", pa.string_view())]).serialize().to_pybytes()), "cast to string"),
        (create(compression=None), "one row without nulls"),
        (create(compression="zip"), "compression is 'lz4', 'zstd' or None, not 'zip'"),
        (create(ttl_us=5), "needs a column"),
        (create(ttl_column="nope", ttl_us=5), "no column 'nope'"),
        (create(ttl_column="name", ttl_us=5), "cannot live by a string"),
        (create(ttl_column="id"), "1 to 9007199254740992 microseconds, not 0"),
        (create(ttl_column="id", ttl_us=-1), "1 to 9007199254740992 microseconds, not -1"),
        (create(ttl_stamped=True), "needs a column"),
        (create(ttl_column="id", ttl_us=1, ttl_stamped=True), "neither key nor merged"),
        (create(merge=[(None, "sum")]), "one row without nulls"),
        (create(merge=[("nope", "sum")]), "no column 'nope'"),
        (create(merge=[("name", "sum")]), "'sum' cannot merge string: use an integer"),
        (create(merge=[("name", "first")]), "'first' is no merge operator; there is 'sum'"),
        (create(merge=[("id", "max")]), "the key says which row it is"),
        (create(merge=[("name", "max"), ("id", "max")]), "another order"),
        (create(merge=[("name", "max"), ("name", "max")]), "another order"),
        (pa.py_buffer(b""), "not a valid record batch"),
        (pa.py_buffer(b"\xff" * 64), "not a valid record batch"),
        (payload.encode_rows(ROWS), "not a valid record batch"),
    ],
)
def test_create_table_refused(data: pa.Buffer, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        payload.decode_create_table(data)


def test_one_row_only() -> None:
    for rows in ([], [{"name": "a"}, {"name": "b"}]):
        data = encode_payload(pa.RecordBatch.from_pylist(rows, payload.DROP_TABLE_SCHEMA))
        with pytest.raises(UsageError, match=r"the name of a table: (one row|there are none)"):
            payload.decode_drop_table(data)


class Extension(pa.ExtensionType):
    """Notices when it is made from bytes off the wire."""

    made = 0

    def __init__(self) -> None:
        super().__init__(pa.int64(), "marble.tests.extension")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Extension:
        cls.made += 1
        return cls()


def test_extension_types_from_strangers_are_never_instantiated() -> None:
    data = create(schema=pa.schema([("id", pa.int64()), ("x", pa.list_(Extension()))]).serialize().to_pybytes())
    pa.register_extension_type(Extension())
    try:
        Extension.made = 0
        with pytest.raises(UsageError, match="extension types cannot be stored"):
            payload.decode_create_table(data)
        assert Extension.made == 0
    finally:
        pa.unregister_extension_type("marble.tests.extension")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (ROWS.slice(0, 0), "rows: there are none"),
        (ROWS.select(["id", "name"]), "not a valid record batch"),
        (ROWS.set_column(1, "name", pa.array(["a", None, "b"])), "'name' is in the key and is null in row 1"),
    ],
)
def test_rows_refused(batch: pa.RecordBatch, message: str) -> None:
    with pytest.raises(UsageError, match=f"table 't'.*{message}"):
        payload.decode_rows(encode_payload(batch), TABLE)


def test_keys_refused() -> None:
    keys = pa.RecordBatch.from_pydict({"name": ["a"], "id": pa.nulls(1, pa.int64())})
    with pytest.raises(UsageError, match="'id' is in the key and is null in row 0"):
        payload.decode_keys(encode_payload(keys), TABLE)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_payloads_are_refused_or_valid(seed: int) -> None:
    """A proposer may seal anything: whatever the bytes, the answer is valid rows or a UsageError, and no crash."""
    chance = random.Random(seed)
    good = payload.encode_rows(ROWS).to_pybytes()
    refused = 0
    for _ in range(1000):
        damaged = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        if chance.randrange(8) == 0:
            del damaged[chance.randrange(len(damaged)) :]
        try:
            decoded = payload.decode_rows(pa.py_buffer(bytes(damaged)), TABLE)
        except UsageError:
            refused += 1
            continue
        decoded.validate(full=True)
        assert decoded.schema == TABLE.schema
        assert decoded.num_rows > 0
        decoded.to_pylist()
    assert refused > 100


@pytest.mark.parametrize("seed", range(2))
def test_damaged_definitions_are_refused_or_valid(seed: int) -> None:
    chance = random.Random(seed)
    good = SCHEMA.serialize().to_pybytes()
    refused = 0
    for _ in range(500):
        damaged = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        try:
            name, schema, key, _ = payload.decode_create_table(create(schema=bytes(damaged)))
        except UsageError:
            refused += 1
            continue
        assert check_table(name, schema, key) == (schema, key)
    assert refused > 50
