"""How long devices take to exchange tensors, by where they stand.

A cluster is domains of `chip.domain` devices on fast links, joined by a network on which every device has its own
share. The formulas are those of ring and hierarchical algorithms (Thakur et al. 2005; NCCL): the last byte of an
all-gather over n devices has passed (n - 1)/n of the whole tensor through each device. Latency is a few microseconds
a hop and counts for small tensors only.
"""

from __future__ import annotations

from dataclasses import dataclass

from tael.cost.chips import Chip

HOP_SECONDS = 5e-6
"""One hop's latency: about what NCCL adds per step within a cluster."""


@dataclass(frozen=True)
class Group:
    """`size` devices of one communicator, `local` of them in each domain."""

    size: int
    local: int

    @property
    def domains(self) -> int:
        return -(-self.size // self.local)


def group(chip: Chip, size: int, stride: int = 1) -> Group:
    """A communicator of every `stride`-th device: neighbours fill a domain before they cross to the next."""
    return Group(size, max(1, min(size, chip.domain // stride)))


def all_gather(chip: Chip, members: Group, size: float, efficiency: float = 1.0) -> float:
    """Seconds until every member holds all `size` bytes (the whole tensor); reduce-scatter takes the same.

    Hierarchical: across domains each device fetches its 1/local of the remote part over its own network share, and
    within a domain the parts go round on the links; both run at once, so the slower one counts.
    """
    if members.size <= 1 or size <= 0:
        return 0.0
    inside = size * (members.local - 1) / members.local / chip.link_bandwidth
    remote = size * (members.domains - 1) / members.domains
    across = remote / members.local / chip.network_bandwidth
    hops = (members.local - 1) + (members.domains - 1)
    return max(inside, across) / efficiency + _latency(hops)


def all_reduce(chip: Chip, members: Group, size: float, efficiency: float = 1.0) -> float:
    """Seconds for a sum that all members hold: a reduce-scatter, then an all-gather."""
    return 2.0 * all_gather(chip, members, size, efficiency)


def point_to_point(chip: Chip, size: float, *, remote: bool, efficiency: float = 1.0) -> float:
    """Seconds for `size` bytes from one device to another, in its domain or not."""
    if size <= 0:
        return 0.0
    return size / (chip.network_bandwidth if remote else chip.link_bandwidth) / efficiency + HOP_SECONDS


def all_to_all(chip: Chip, members: Group, size: float, efficiency: float = 1.0) -> float:
    """Seconds when every member sends `size` bytes, an equal part of it to each member (itself included)."""
    if members.size <= 1 or size <= 0:
        return 0.0
    inside = size * (members.local - 1) / members.size / chip.link_bandwidth
    across = size * (members.size - members.local) / members.size / chip.network_bandwidth
    return max(inside, across) / efficiency + _latency(members.domains)


def nodes_reached(chosen: int, domains: int, limit: int | None) -> float:
    """Domains that hold a token's experts, in the mean, when `chosen` experts fall evenly: n (1 - (1 - 1/n)^k)."""
    expected = domains * (1.0 - (1.0 - 1.0 / domains) ** chosen)
    return min(expected, float(limit)) if limit is not None else expected


def dispatch(
    chip: Chip, members: Group, tokens: float, row_bytes: float, chosen: int, limit: int | None, efficiency: float
) -> float:
    """Seconds to bring each device's `tokens` to their experts, or to bring them back (V3 report, section 3.2.2).

    A token crosses the network once for each domain that holds one of its experts, then goes on by the links to each
    of the `chosen`; the two are pipelined, so the slower one counts.
    """
    if members.size <= 1 or tokens <= 0:
        return 0.0
    reached = nodes_reached(chosen, members.domains, limit)
    across = reached * (members.domains - 1) / members.domains * tokens * row_bytes / chip.network_bandwidth
    inside = chosen * (members.local - 1) / members.local * tokens * row_bytes / chip.link_bandwidth
    return max(across, inside) / efficiency + _latency(members.domains)


def _latency(hops: int) -> float:
    return HOP_SECONDS * min(hops, 64)  # beyond that trees and rails are used
