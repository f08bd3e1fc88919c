"""Python's values on their way into a key."""

from __future__ import annotations

import pytest

from marble._core.key_codec import type_of_all


@pytest.mark.parametrize(
    ("values", "type_"),
    [
        ([], None),
        ((), None),
        ([1], int),
        ([True, True], bool),
        ([1, True], None),
        ((b"a", b""), bytes),
        ([b"k%d" % i for i in range(1000)], bytes),
        ([b"k%d" % i for i in range(1000)] + [None], None),
        (["a", 1], None),
    ],
)
def test_the_one_type_of_values(values: list[object] | tuple[object, ...], type_: type | None) -> None:
    assert type_of_all(values) is type_


def test_only_lists_and_tuples_have_items_to_look_at() -> None:
    with pytest.raises(TypeError, match="got set"):
        type_of_all({1})
