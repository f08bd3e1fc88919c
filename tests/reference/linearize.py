"""The slow and obvious twin of the linearizability checker: try every order, on a dict, one operation at a time.

It knows nothing of guards, partitions or debts: it asks what a table would have answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from marble.testing.history import Operation, OperationKind

Table = dict[Any, Any]


def linearizable(operations: Sequence[Operation], initial: Any = None) -> bool:
    """Whether some order of `operations`, all at once atomic, keeps their order in time and explains their answers."""
    table = {} if initial is None else {key: initial for operation in operations for key in _keys(operation)}
    return _search([operation for operation in operations if not operation.refused], table)


def _search(left: list[Operation], table: Table) -> bool:
    if all(operation.returned is None for operation in left):
        return True
    for operation in left:
        if any(other.returned is not None and other.returned < operation.called for other in left):
            continue
        after = dict(table)
        answer = apply(operation, after)
        told = operation.returned is not None and operation.answer is not None
        if operation.kind is OperationKind.DELETE and told:
            # The checker takes a count for an answer only if all or none of the keys were there.
            told = not 0 < operation.answer < len(set(operation.argument))
        if (told or operation.kind is OperationKind.READ) and operation.returned and answer != operation.answer:
            continue
        if _search([other for other in left if other is not operation], after):
            return True
    return False


def apply(operation: Operation, table: Table) -> Any:
    """Do it, and answer as a table does."""
    what = operation.argument
    match operation.kind:
        case OperationKind.WRITE:
            table.update(what)
            return None
        case OperationKind.DELETE:
            return sum(1 for key in set(what) if table.pop(key, None) is not None)
        case OperationKind.CAS:
            key, expected, value = what
            if table.get(key) != expected:
                return False
            table[key] = value
            return True
        case OperationKind.READ:
            return table.get(what)
        case OperationKind.GET:
            return {key: table[key] for key in what if key in table}
        case OperationKind.SCAN:
            first, end = what
            return {
                key: value
                for key, value in table.items()
                if (first is None or first <= key) and (end is None or key < end)
            }


def _keys(operation: Operation) -> tuple[Any, ...]:
    if operation.kind in (OperationKind.READ, OperationKind.CAS):
        return (operation.argument if operation.kind is OperationKind.READ else operation.argument[0],)
    return () if operation.kind is OperationKind.SCAN else tuple(operation.argument)
