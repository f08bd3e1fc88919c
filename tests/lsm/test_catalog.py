"""The catalog: ids are never used again, and equal histories give equal catalogs."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marble.errors import UsageError
from marble.lsm import catalog as module
from marble.lsm.catalog import Catalog

SCHEMA = pa.schema([("id", pa.int64()), ("v", pa.string())])


def test_create_counts_ids_upwards() -> None:
    catalog, first = Catalog().create("b", SCHEMA, ["id"])
    catalog, second = catalog.create("a", SCHEMA, ["v"])
    assert (first.id, second.id) == (1, 2)
    assert catalog.tables() == [second, first]
    assert catalog.get("a") is catalog.get(2) is second


def test_create_again_is_the_same_table() -> None:
    catalog, first = Catalog().create("t", SCHEMA, ["id"])
    again, info = catalog.create("t", SCHEMA, ("id",))
    assert again is catalog
    assert info is first


@pytest.mark.parametrize(
    ("schema", "key"), [(SCHEMA, ["v"]), (SCHEMA, ["id", "v"]), (pa.schema([SCHEMA.field(1), SCHEMA.field(0)]), ["id"])]
)
def test_create_with_another_definition_is_refused(schema: pa.Schema, key: list[str]) -> None:
    catalog, _ = Catalog().create("t", SCHEMA, ["id"])
    with pytest.raises(UsageError, match="'t' exists already with another schema, key or options"):
        catalog.create("t", schema, key)


def test_drop_never_frees_an_id() -> None:
    catalog, _ = Catalog().create("t", SCHEMA, ["id"])
    catalog, dropped = catalog.drop("t")
    assert dropped.id == 1
    assert catalog.tables() == []
    catalog, again = catalog.create("t", SCHEMA, ["id"])
    assert again.id == 2
    with pytest.raises(UsageError, match="no table with id 1: it has been dropped"):
        catalog.get(1)


def test_unknown_table_names_the_nearest() -> None:
    catalog, _ = Catalog().create("flights", SCHEMA, ["id"])
    for call in (catalog.get, catalog.drop):
        with pytest.raises(UsageError, match="no table 'flihgts'; did you mean 'flights'"):
            call("flihgts")


def test_an_older_catalog_is_untouched() -> None:
    before, _ = Catalog().create("a", SCHEMA, ["id"])
    before.create("b", SCHEMA, ["id"])
    before.drop("a")
    assert [info.name for info in before.tables()] == ["a"]
    with pytest.raises(TypeError):
        before.by_name["x"] = before.get("a")  # type: ignore[index]


def test_number_of_tables_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TABLES_MAX", 2)
    catalog, _ = Catalog().create("a", SCHEMA, ["id"])
    catalog, _ = catalog.create("b", SCHEMA, ["id"])
    assert catalog.create("b", SCHEMA, ["id"])[0] is catalog
    with pytest.raises(UsageError, match="there are 2 tables already; drop one first"):
        catalog.create("c", SCHEMA, ["id"])
    catalog, _ = catalog.drop("a")
    assert catalog.create("c", SCHEMA, ["id"])[1].id == 3


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc"), st.sampled_from(["id", "v"]))))
def test_against_a_dict(steps: list[tuple[bool, str, str]]) -> None:
    catalog = Catalog()
    model: dict[str, tuple[int, str]] = {}
    ids = 0
    for create, name, key in steps:
        try:
            if create:
                catalog, info = catalog.create(name, SCHEMA, [key])
                if name not in model:
                    ids += 1
                    model[name] = (ids, key)
                assert model[name] == (info.id, key)
            else:
                catalog, info = catalog.drop(name)
                assert model.pop(name)[0] == info.id
        except UsageError:
            assert model[name][1] != key if create else name not in model
        assert {info.name: (info.id, info.key[0]) for info in catalog.tables()} == model
        assert {info.id for info in catalog.by_id.values()} == {id_ for id_, _ in model.values()}
