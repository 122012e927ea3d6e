"""Waiting at servers that share one queue, by Erlang's formula (M/M/c): requests arrive by chance, first come first
served, and take exponentially long."""

from __future__ import annotations

import math


def erlangs(rate: float, service_s: float) -> float:
    """How many servers are busy on average: requests a second, times seconds each."""
    return rate * service_s


def waits_at_all(servers: int, load: float) -> float:
    """Erlang C: the share of requests that find every server busy. `load` in erlangs; 1.0 if it is too much."""
    if load >= servers:
        return 1.0
    blocked = 1.0
    for count in range(1, servers + 1):  # Erlang B, which stays finite where factorials don't
        blocked = load * blocked / (count + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))


def mean_wait_s(servers: int, rate: float, service_s: float) -> float:
    load = erlangs(rate, service_s)
    if load >= servers:
        return math.inf
    return waits_at_all(servers, load) * service_s / (servers - load)


def wait_quantile_s(servers: int, rate: float, service_s: float, share: float) -> float:
    """What `share` of the requests wait at most, as 0.99."""
    load = erlangs(rate, service_s)
    if load >= servers:
        return math.inf
    beyond = waits_at_all(servers, load)
    if beyond <= 1 - share:
        return 0.0
    return math.log(beyond / (1 - share)) * service_s / (servers - load)


def groups_needed(group: int, rate: float, service_s: float, goal_s: float, share: float = 0.99) -> int:
    """Fewest groups of `group` servers with which `share` of the requests wait for `goal_s` at most; 1 at least."""
    groups = max(1, math.ceil(erlangs(rate, service_s) / group))
    while wait_quantile_s(groups * group, rate, service_s, share) > goal_s:
        groups += 1
    return groups
