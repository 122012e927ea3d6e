"""Waiting times at servers that share one queue, by Erlang's C formula (M/M/c): arrivals are a Poisson process, service
times are exponential, first come first served."""

from __future__ import annotations

import math


def erlangs(rate: float, service_s: float) -> float:
    """The mean number of busy servers: requests a second, times seconds of each."""
    return rate * service_s


def erlang_c(servers: int, load: float) -> float:
    """The share of requests that find every server busy. `load` is in erlangs; 1.0 if it exceeds the servers."""
    if load >= servers:
        return 1.0
    blocked = 1.0
    for count in range(1, servers + 1):  # Erlang B by recursion: factorials would overflow
        blocked = load * blocked / (count + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))


def mean_wait_s(servers: int, rate: float, service_s: float) -> float:
    load = erlangs(rate, service_s)
    if load >= servers:
        return math.inf
    return erlang_c(servers, load) * service_s / (servers - load)


def wait_quantile_s(servers: int, rate: float, service_s: float, share: float) -> float:
    """The longest wait of a `share` of the requests, such as 0.99; infinite if the servers can't keep up."""
    load = erlangs(rate, service_s)
    if load >= servers:
        return math.inf
    waiting = erlang_c(servers, load)
    if waiting <= 1 - share:
        return 0.0
    return math.log(waiting / (1 - share)) * service_s / (servers - load)


def groups_needed(group: int, rate: float, service_s: float, goal_s: float, share: float = 0.99) -> int:
    """The smallest number of groups of `group` servers with which a `share` of the requests waits at most `goal_s`; at
    least 1."""
    groups = max(1, math.ceil(erlangs(rate, service_s) / group))
    while wait_quantile_s(groups * group, rate, service_s, share) > goal_s:
        groups += 1
    return groups
