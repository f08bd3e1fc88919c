"""Safety under everything that may go wrong, and progress once it stops."""

from __future__ import annotations

import pytest
from raft.random_cluster import RandomCluster

TIGHT = {"append_bytes_max": 40, "inflight_messages_max": 2, "inflight_bytes_max": 60}


@pytest.mark.parametrize("pre_vote", [True, False])
@pytest.mark.parametrize("check_quorum", [True, False])
@pytest.mark.parametrize(("size", "seed", "chaos"), [(3, 1, 1), (3, 2, 5), (5, 3, 1), (5, 6, 3), (1, 4, 1), (2, 5, 1)])
def test_cluster_keeps_its_promises(size: int, seed: int, chaos: int, pre_vote: bool, check_quorum: bool) -> None:
    tight = TIGHT if seed % 2 else {}
    cluster = RandomCluster(seed, size, chaos, pre_vote=pre_vote, check_quorum=check_quorum, **tight)
    for _ in range(3000):
        cluster.step()
    cluster.heal()
    assert len(cluster.committed) > 1
    assert len(cluster.leaders) > 1


@pytest.mark.parametrize("lease_reads", [True, False])
@pytest.mark.parametrize("pre_vote", [True, False])
@pytest.mark.parametrize(("size", "seed", "chaos"), [(3, 1, 1), (3, 2, 5), (5, 3, 2), (1, 4, 1), (2, 5, 1)])
def test_changing_cluster_keeps_its_promises(
    size: int, seed: int, chaos: int, pre_vote: bool, lease_reads: bool
) -> None:
    tight = TIGHT if seed % 2 else {}
    cluster = RandomCluster(seed, size, chaos, pre_vote=pre_vote, lease_reads=lease_reads, **tight)
    cluster.weights[cluster.administer] = 4
    for _ in range(4000):
        cluster.step()
    cluster.heal()
    assert len(cluster.committed) > 1


def test_a_dozen_histories_have_everything_in_them() -> None:
    seen = dict.fromkeys(("changed", "installed", "handed_over", "leased", "answered"), 0)
    for seed in range(12):
        cluster = RandomCluster(seed, 3, lease_reads=True)
        cluster.weights[cluster.administer] = 4
        for _ in range(3000):
            cluster.step()
        for name in seen:
            seen[name] += getattr(cluster, name)
    assert all(seen.values()), seen


def test_one_seed_gives_one_history() -> None:
    histories = []
    for _ in range(2):
        cluster = RandomCluster(11, 3)
        for _ in range(1500):
            cluster.step()
        histories.append((cluster.committed, cluster.leaders, [node.rows for node in cluster.nodes.values()]))
    assert histories[0] == histories[1]
    assert histories[0][0]
