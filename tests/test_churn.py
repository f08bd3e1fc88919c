"""``bench/churn.py`` in short: what databases held is given back when they are closed, and what grows is noticed."""

from __future__ import annotations

import gc
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PLACE = Path(__file__).parents[1] / "bench" / "churn.py"


@pytest.fixture
def churn(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("marble_bench_churn", PLACE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    gc.collect()
    return module


def test_nothing_is_left_when_all_is_closed(churn: ModuleType, tmp_path: Path) -> None:
    samples = churn.churn(tmp_path, 0.0, 7, False)
    assert churn.left(samples) == []
    # Between them there was something to be left.
    assert samples[1].mappings > 0
    assert samples[1].files > samples[0].files
    assert samples[1].threads > samples[0].threads
    assert samples[1].arrow_bytes > samples[0].arrow_bytes + churn.LEFT_BYTES_MAX


def test_what_is_kept_is_noticed(churn: ModuleType, tmp_path: Path) -> None:
    before = churn.sample(0.0)
    db, plain, *_ = churn.opened(tmp_path)
    plain.write(churn.rows(churn.random.Random(1)))
    reader = plain.scan().to_reader()
    reader.read_next_batch()
    kept = churn.left([before, churn.sample(0.0)])
    assert [words.partition(":")[0] for words in kept][:2] == ["files", "threads"]
    db.close()
    reader.close()
    del reader, plain, db, _
    assert churn.left([before, churn.sample(0.0)]) == []


def test_a_slope_is_that_of_most_rounds(churn: ModuleType) -> None:
    def samples(figures: list[int]) -> list[object]:
        return [churn.Sample(36.0 * i, figure, 0, 0, 0, 0) for i, figure in enumerate(figures)]

    assert churn.slope(samples([5] * 100), "rss_bytes") == 0
    assert churn.slope(samples([1000 * i for i in range(100)]), "rss_bytes") == pytest.approx(100_000)
    teeth = [1000 * (i % 10) for i in range(200)]
    assert abs(churn.slope(samples(teeth), "rss_bytes")) < 1000
    assert churn.slope(samples([*([5] * 50), 10**9, *([5] * 50)]), "rss_bytes") == 0
