"""The page in a real browser: who leads, numbers that move, nothing from elsewhere, and clear words when nobody answers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server.cluster import Cluster, eventually, free_endpoints, rows
from server.test_http import StillNode
from web.browser import asked_for, be_a_phone, chromium, prefer

from marble.config import HttpConfig
from marble.errors import UnavailableError
from marble.metrics import Metrics
from marble.web.http import HttpServer
from marble.web.observer import Observer


class ShownCluster(Cluster):
    """Three nodes with pages that link to each other, and somebody who writes all the time."""

    def __init__(self, directory: Path) -> None:
        places = dict(enumerate(free_endpoints(3), start=1))
        pages = {node: f"http://{place}/" for node, place in places.items()}
        self.http = {node: HttpConfig(place, pages) for node, place in places.items()}
        self._ending = threading.Event()
        super().__init__(directory)
        leader = self.servers[self.leader()]
        self._table = leader.database.create_table("t", rows(0, 1).schema, key=["id"])
        self._writer = threading.Thread(target=self._write, name="writer")
        self._writer.start()

    def _write(self) -> None:
        position = 0
        while not self._ending.wait(0.01):
            self._table.write(rows(position, position + 3))
            position += 3

    def page(self, node: int) -> str:
        url = self.servers[node].page_url
        assert url is not None
        return url

    def stop(self) -> None:
        self._ending.set()
        with contextlib.suppress(AttributeError):
            self._writer.join()
        super().stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def cluster(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShownCluster]:
    made = ShownCluster(tmp_path_factory.mktemp("shown"))
    try:
        leader = made.servers[made.leader()]
        # The page is to have a past when it is opened.
        eventually(lambda: len(leader._watching("the past").picture()["moments"]["at"]) >= 4, "a history")
        yield made
    finally:
        made.stop()


def text(driver: Any, selector: str) -> str:
    found: str = driver.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)
    return found


def state(driver: Any) -> str:
    return str(driver.execute_script("return document.body.dataset.state"))


def facts(driver: Any) -> dict[str, str]:
    script = "return [...document.querySelectorAll('#facts > div')].map(e => [...e.children].map(c => c.textContent))"
    return dict(driver.execute_script(script))


def complaints(driver: Any) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_it_shows_the_leader_and_numbers_that_move(browser: Any, cluster: ShownCluster) -> None:
    leader = cluster.leader()
    asked_for(browser)
    complaints(browser)
    browser.get(cluster.page(leader))
    eventually(lambda: state(browser) == "live", "an answer")
    assert text(browser, "#headline") == f"Node {leader} leads"
    assert "term " in text(browser, "#subline")
    assert text(browser, "#cluster") == "test"
    curve = browser.execute_script(
        "return document.querySelector('.chart .stroke').getAttribute('d').split('L').length"
    )
    assert curve >= 3, "a page that was just opened has the past"
    first = int(facts(browser)["commit index"].replace(",", ""))
    eventually(lambda: int(facts(browser)["commit index"].replace(",", "")) > first + 20, "writes")
    assert eventually(lambda: "ms" in text(browser, ".chart:nth-of-type(2) .now") or None, "the latency of writes")
    committed = text(browser, ".chart .now")
    eventually(lambda: text(browser, ".chart .now") != committed, "another number")
    nodes = browser.execute_script(
        "return [...document.querySelectorAll('#nodes li')].map(e => [e.dataset.node, e.textContent])"
    )
    assert [node for node, _ in nodes] == ["1", "2", "3"]
    assert "writes go here" in dict(nodes)[str(leader)]
    assert browser.execute_script("return document.querySelectorAll('#parts .dot.good').length") >= 9
    assert complaints(browser) == []
    asked = asked_for(browser)
    assert len(asked) >= 5
    assert [url for url in asked if not url.startswith(cluster.page(leader))] == []


def test_a_follower_shows_what_it_knows_and_the_way_to_the_leader(browser: Any, cluster: ShownCluster) -> None:
    leader, follower = cluster.leader(), cluster.follower()
    browser.get(cluster.page(follower))
    eventually(lambda: state(browser) == "live", "an answer")
    assert text(browser, "#headline") == f"Node {leader} leads"
    assert f"seen from node {follower}, a follower" in text(browser, "#subline")
    assert "nothing is written through this node" in text(browser, "#charts")
    eventually(lambda: any(letter in "123456789" for letter in text(browser, ".chart .now")), "what the group commits")
    browser.execute_script("document.querySelector('#subline a').click()")
    eventually(lambda: browser.current_url == cluster.page(leader) and state(browser) == "live", "the leader's page")
    assert complaints(browser) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_both_times_of_day(browser: Any, cluster: ShownCluster, scheme: str) -> None:
    browser.get(cluster.page(cluster.leader()))
    eventually(lambda: state(browser) == "live", "an answer")
    prefer(browser, scheme)
    be_a_phone(browser)
    try:
        wide = eventually(
            lambda: browser.execute_script("return innerWidth === 390 && document.documentElement.scrollWidth"),
            "the size",
        )
        assert wide <= 390
        script = "return getComputedStyle(document.body)[arguments[0]].match(/\\d+/g).map(Number)"
        ground, ink = (sum(browser.execute_script(script, name)) for name in ("backgroundColor", "color"))
        assert (ground > ink) == (scheme == "light")
        assert abs(ground - ink) > 450, "words can be read"
        small = (
            "return [...document.querySelectorAll('main *')]"
            ".filter(e => e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) < 11).length"
        )
        assert browser.execute_script(small) == 0
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        prefer(browser, "light")


def test_the_range_can_be_chosen(browser: Any, cluster: ShownCluster) -> None:
    browser.get(cluster.page(cluster.leader()))
    eventually(lambda: state(browser) == "live", "an answer")
    script = "const all = [...document.querySelectorAll('#range button')]; all[2].click(); return all.map(b => b.ariaPressed)"
    assert browser.execute_script(script) == ["false", "false", "true"]


class OneNode:
    """A node that says what a test wants, with a port that can go and come back."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.node = StillNode()
        self.node.metrics = Metrics()
        self.endpoint = free_endpoints(1)[0]
        self.allowed = "Bearer right"
        self.authorize = False
        self.server: HttpServer | None = None

    def start(self) -> None:
        observer = Observer(self.node, 1, self.directory)
        authorize = (lambda header: header == self.allowed) if self.authorize else None

        def listen() -> HttpServer | None:
            try:
                return HttpServer(observer, HttpConfig(self.endpoint), authorize)
            except UnavailableError:
                return None

        self.server = eventually(listen, "the port")
        self.server.start()

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
            self.server = None


@pytest.fixture
def one(tmp_path: Path) -> Iterator[OneNode]:
    made = OneNode(tmp_path)
    yield made
    made.stop()


def test_it_says_when_nobody_answers_and_goes_on_when_somebody_does(browser: Any, one: OneNode) -> None:
    one.start()
    browser.get(f"http://{one.endpoint}/")
    eventually(lambda: state(browser) == "live", "an answer")
    assert text(browser, "#headline") == "The engine has not answered yet"
    assert text(browser, "#link-text") == "live, not ready"
    one.stop()
    eventually(lambda: state(browser) == "lost", "news of the loss")
    assert text(browser, "#link-text") == "disconnected"
    assert text(browser, "#notice").startswith("No answer from this node for ")
    one.start()
    eventually(lambda: state(browser) == "live", "the return")
    assert browser.execute_script("return document.querySelector('#notice').hidden") is True


def test_it_asks_for_a_token(browser: Any, one: OneNode) -> None:
    one.authorize = True
    one.start()
    browser.get(f"http://{one.endpoint}/")
    shown = "return !document.querySelector('#token').hidden"
    eventually(lambda: browser.execute_script(shown), "the question")
    assert state(browser) == "lost"
    browser.execute_script(
        "document.querySelector('#token-text').value = 'right'; document.querySelector('#token').requestSubmit()"
    )
    eventually(lambda: state(browser) == "live", "an answer")
    assert browser.execute_script(shown) is False


def test_what_a_node_says_is_never_markup(browser: Any, one: OneNode) -> None:
    evil = "<img src=x onerror=\"document.title='pwned'\">"
    one.node.status = {
        "cluster_id": evil,
        "node_id": 1,
        "role": evil,
        "term": 1,
        "leader_id": 2,
        "members": [1, 2],
        "nodes": {"1": evil, "2": evil},
        **dict.fromkeys(
            ("last_index", "commit_index", "applied_index", "snapshot_index", "log_bytes", "memory_bytes"), 0
        ),
    }
    one.start()
    browser.get(f"http://{one.endpoint}/")
    eventually(lambda: state(browser) == "live", "an answer")
    assert text(browser, "#cluster") == evil
    assert browser.execute_script("return document.querySelectorAll('main img').length") == 0
    assert browser.title.startswith("Node 2 leads")
