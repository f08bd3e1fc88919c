"""The Grafana dashboard, as strictly as it can be looked at without Grafana: by the models that Grafana publishes of it, and by a parser
of PromQL. What it asks for must be among what a node shows, with these labels.
"""

from __future__ import annotations

import copy
import enum
import itertools
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from marble.web.instruments import INSTRUMENTS, Kind

DASHBOARD: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[2] / "docs" / "grafana" / "marble.json").read_text()
)
TARGETS = [(panel["title"], target) for panel in DASHBOARD["panels"] for target in panel["targets"]]
QUERIES = [target["expr"] for _, target in TARGETS]
KNOWN = {described.exported: described for described in INSTRUMENTS.values()}

SCRAPED = frozenset({"job", "instance"})
"""Labels that Prometheus gives everything it scrapes."""
RISING = frozenset({"marble_commit_index", "marble_process_cpu_seconds"})
"""Gauges that only rise while a node runs."""
OF_COUNTERS = frozenset({"rate", "irate", "increase"})
COLUMNS = 24

register_default_plugins()


# -- as Grafana reads it ---------------------------------------------------------------------------------------------------


def lost(given: Any, kept: Any, place: str = "") -> Iterator[str]:
    """What of `given` is not in `kept`: Grafana's models drop what they do not know."""
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(kept, dict) or key not in kept:
                yield f"{place}/{key}"
            else:
                yield from lost(value, kept[key], f"{place}/{key}")
    elif isinstance(given, list):
        if not isinstance(kept, list) or len(given) != len(kept):
            yield place
        else:
            for at, (one, other) in enumerate(zip(given, kept, strict=True)):
                yield from lost(one, other, f"{place}/{at}")
    elif given != kept:
        yield place


def unlike(value: Any, hint: Any, place: str = "") -> Iterator[str]:
    """Where `value`, of Grafana's models, is not of the type that these say."""
    kind = typing.get_origin(hint)
    if kind in (typing.Union, types.UnionType):
        choices = typing.get_args(hint)
        if not any(not list(unlike(value, choice, place)) for choice in choices):
            yield place
    elif kind is typing.Literal:
        if value not in typing.get_args(hint):
            yield place
    elif kind is list:
        if not isinstance(value, list):
            yield place
        else:
            for at, each in enumerate(value):
                yield from unlike(each, *typing.get_args(hint), f"{place}/{at}")
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        if value not in {each.value for each in hint}:
            yield place
    elif hint is float:
        if not isinstance(value, int | float):
            yield place
    elif isinstance(hint, type) and not getattr(hint, "_is_protocol", False):
        if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
            yield place
        elif hasattr(value, "to_json"):
            yield from inside(value, place)
    elif hasattr(value, "to_json"):
        # Options of a panel, or a query: what is there, there knows the model.
        yield from inside(value, place)


def inside(value: Any, place: str) -> Iterator[str]:
    for name, hint in typing.get_type_hints(type(value)).items():
        yield from unlike(getattr(value, name), hint, f"{place}/{name}")


def faults(dashboard: dict[str, Any]) -> list[str]:
    """What Grafana would not take as it is meant."""
    model = Dashboard.from_json(dashboard)
    kept = json.loads(JSONEncoder(sort_keys=True).encode(model))
    return [*lost(dashboard, kept), *inside(model, "")]


def test_grafana_takes_all_of_it_as_it_is_meant() -> None:
    assert faults(DASHBOARD) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("refrehs",), "10s"),
        (("refresh",), 10),
        (("panels", 0, "tpye"), "stat"),
        (("panels", 0, "gridPos", "x"), "left"),
        (("panels", 0, "options", "colourMode"), "value"),
        (("panels", 0, "options", "colorMode"), "colour"),
        (("panels", 8, "fieldConfig", "defaults", "unti"), "Bps"),
        (("panels", 8, "targets", 0, "exprr"), "1"),
        (("panels", 8, "targets", 0, "expr"), 1),
        (("templating", "list", 0, "type"), "data source"),
    ],
    ids=lambda value: "/".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_grafana_does_not_know_is_found(path: tuple[str | int, ...], value: object) -> None:
    broken: Any = copy.deepcopy(DASHBOARD)
    place = broken
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert faults(broken) != []


def test_panels_have_their_own_ids_and_places() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert place["x"] + place["w"] <= COLUMNS, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
        letters = [target["refId"] for target in panel["targets"]]
        assert len(letters) == len(set(letters)), panel["title"]


# -- as Prometheus reads it ------------------------------------------------------------------------------------------------


def parsed(query: str) -> Any:
    """`query` as Prometheus gets it, for which Grafana fills in its own names."""
    for name in re.findall(r"\$\{?(\w+)", query):
        assert name == "__rate_interval" or name in {each["name"] for each in DASHBOARD["templating"]["list"]}, name
    return promql.parse(query.replace("$__rate_interval", "1m"))


def labels_of(selector: Any) -> set[str]:
    """The labels that what `selector` selects has. It must be there, and be asked for by labels that it has."""
    name = selector.name
    described = KNOWN.get(name)
    if described is not None and described.kind is not Kind.HISTOGRAM:
        labels = {*described.labels, *SCRAPED}
    else:
        base, _, what = name.rpartition("_")
        assert what in ("bucket", "sum", "count"), f"{name} is not shown"
        assert KNOWN[base].kind is Kind.HISTOGRAM, f"{name} is not shown"
        labels = {*KNOWN[base].labels, *SCRAPED} | ({"le"} if what == "bucket" else set())
    asked = {matcher.name for matcher in selector.matchers.matchers}
    assert asked <= labels, f"{name} has no labels {asked - labels}"
    assert "job" in asked, f"{name} is asked of all jobs"
    return labels


def result_labels(node: Any) -> set[str] | None:
    """The labels of what an expression gives; None for a plain number. Asserts that it makes sense."""
    if isinstance(node, promql.NumberLiteral | promql.StringLiteral):
        return None
    if isinstance(node, promql.ParenExpr):
        return result_labels(node.expr)
    if isinstance(node, promql.VectorSelector):
        return labels_of(node)
    if isinstance(node, promql.MatrixSelector):
        return labels_of(node.vector_selector)
    if isinstance(node, promql.AggregateExpr):
        inner = result_labels(node.expr)
        assert inner is not None
        if node.modifier is None:
            return set()
        assert node.modifier.type == promql.AggModifierType.By
        by = set(node.modifier.labels)
        assert by <= inner, f"there are no labels {by - inner}"
        return by
    if isinstance(node, promql.BinaryExpr):
        sides = [side for side in (result_labels(node.lhs), result_labels(node.rhs)) if side is not None]
        return sides[0] if sides else None
    assert isinstance(node, promql.Call), f"nobody has thought of {type(node).__name__}"
    function, inner = node.func.name, [result_labels(argument) for argument in node.args]
    if function == "vector":
        return set()
    labels = inner[-1]
    assert labels is not None
    if function in OF_COUNTERS:
        name = node.args[0].vector_selector.name
        assert name.endswith(("_total", "_bucket", "_sum", "_count")) or name in RISING, f"{name} is no counter"
    elif function == "histogram_quantile":
        assert "le" in labels, "a quantile of what has no buckets"
        return labels - {"le"}
    else:
        raise AssertionError(f"nobody has thought of {function}")
    return labels


def test_there_are_queries() -> None:
    assert len(QUERIES) > 20


@pytest.mark.parametrize(("title", "target"), TARGETS, ids=[f"{at}" for at in range(len(TARGETS))])
def test_query_is_promql_about_what_a_node_shows(title: str, target: dict[str, Any]) -> None:
    labels = result_labels(parsed(target["expr"]))
    assert labels is not None, title
    named = set(re.findall(r"\{\{\s*(\w+)\s*\}\}", target.get("legendFormat", "")))
    assert named <= labels, f"{title}: the legend names {named - labels}, which are not there"


def test_variables_are_asked_of_what_a_node_shows() -> None:
    asked = re.findall(r"label_values\((\w+), (\w+)\)", json.dumps(DASHBOARD["templating"]))
    assert len(asked) == json.dumps(DASHBOARD["templating"]).count("label_values")
    for name, label in asked:
        assert label in {*KNOWN[name].labels, *SCRAPED}


@pytest.mark.parametrize(
    "query",
    [
        'rate(marble_commit_index{job="$job"}[$__rate_interval]',
        'rate(marble_term{job="$job"}[$__rate_interval])',
        'rate(marble_requests_total{job="$job"})',
        "max(marble_term)",
        'max(marble_terms{job="$job"})',
        'max(marble_write_seconds{job="$job"})',
        'max(marble_term{job="$job", peer="1"})',
        'sum by (peer) (marble_term{job="$job"})',
        'marble_term{job="$jobs"}',
        'histogram_quantile(0.5, sum by (instance) (rate(marble_write_seconds_bucket{job="$job"}[1m])))',
        'marble_requests_bucket{job="$job"}',
    ],
)
def test_query_that_would_show_nothing_is_found(query: str) -> None:
    with pytest.raises((AssertionError, ValueError, KeyError)):
        result_labels(parsed(query))
