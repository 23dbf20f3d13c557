"""Collectives against cases worked by hand, with latencies taken off."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tael.cost.chips import find_chip
from tael.cost.collectives import (
    HOP_SECONDS,
    Group,
    all_gather,
    all_reduce,
    all_to_all,
    dispatch,
    group,
    nodes_reached,
    point_to_point,
)

CHIP = replace(find_chip("H100"), link_bandwidth=100e9, network_bandwidth=10e9, domain=8)


def test_all_gather_in_a_domain() -> None:
    # 8 GB over 8 devices: each receives 7 GB at 100 GB/s
    assert all_gather(CHIP, group(CHIP, 8), 8e9) == pytest.approx(0.07 + 7 * HOP_SECONDS)


def test_all_gather_over_domains_is_bound_by_the_network() -> None:
    # 16 devices in 2 domains: 4 GB are remote, each of 8 devices fetches 0.5 GB at 10 GB/s, 0.05 s; but the links
    # bring 7/8 of the whole to each device, 0.07 s. With a tenth of the network it is the network, 0.5 s.
    assert all_gather(CHIP, group(CHIP, 16), 8e9) == pytest.approx(0.07 + 8 * HOP_SECONDS)
    slow = replace(CHIP, network_bandwidth=1e9)
    assert all_gather(slow, group(slow, 16), 8e9) == pytest.approx(0.5 + 8 * HOP_SECONDS)
    assert all_gather(CHIP, Group(16, 1), 8e9) == pytest.approx(0.75 + 15 * HOP_SECONDS)


def test_all_reduce_is_two_passes_and_efficiency_divides() -> None:
    members = group(CHIP, 8)
    assert all_reduce(CHIP, members, 8e9) == 2 * all_gather(CHIP, members, 8e9)
    slow, fast = all_gather(CHIP, members, 8e9, 0.5), all_gather(CHIP, members, 8e9)
    assert slow - fast == pytest.approx(0.07)


def test_all_to_all() -> None:
    # 8 GB to 16 members, 1 of 16 to each: 8/16 of it over the network at 10 GB/s
    assert all_to_all(CHIP, group(CHIP, 16), 8e9) == pytest.approx(0.4 + 2 * HOP_SECONDS)
    assert all_to_all(CHIP, group(CHIP, 8), 8e9) == pytest.approx(0.07 + HOP_SECONDS)


def test_nodes_reached() -> None:
    assert nodes_reached(1, 8, None) == pytest.approx(1.0)
    assert nodes_reached(2, 2, None) == pytest.approx(1.5)
    assert nodes_reached(8, 8, None) == pytest.approx(8 * (1 - (7 / 8) ** 8))
    assert nodes_reached(8, 8, 4) == 4.0


def test_dispatch_crosses_the_network_once_a_node() -> None:
    members = Group(64, 8)
    free = dispatch(CHIP, members, 1000, 10_000, 8, None, 1.0)
    limited = dispatch(CHIP, members, 1000, 10_000, 8, 4, 1.0)
    assert limited == pytest.approx(4 * 7 / 8 * 1e7 / 10e9 + 8 * HOP_SECONDS)
    assert free > limited
    # in one domain only the links are used: 8 experts, 7 of 8 remote
    assert dispatch(CHIP, Group(8, 8), 1000, 10_000, 8, None, 1.0) == pytest.approx(7 * 1e7 / 100e9 + HOP_SECONDS)


def test_point_to_point_and_nothing_to_do() -> None:
    assert point_to_point(CHIP, 1e9, remote=True) == pytest.approx(0.1 + HOP_SECONDS)
    assert point_to_point(CHIP, 1e9, remote=False) == pytest.approx(0.01 + HOP_SECONDS)
    assert all_gather(CHIP, group(CHIP, 1), 1e9) == all_to_all(CHIP, group(CHIP, 8), 0) == 0.0


def test_groups_fill_a_domain_first() -> None:
    assert group(CHIP, 4) == Group(4, 4)
    assert group(CHIP, 32) == Group(32, 8)
    assert group(CHIP, 4, stride=8) == Group(4, 1)
    assert group(CHIP, 16, stride=2) == Group(16, 4)
    assert Group(16, 4).domains == 4
