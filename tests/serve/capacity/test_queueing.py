from __future__ import annotations

import math

import pytest

from serve.capacity.queueing import erlang_c, groups_needed, mean_wait_s, wait_quantile_s


def test_erlang_s_formula_gives_what_its_tables_give() -> None:
    assert erlang_c(1, 0.7) == pytest.approx(0.7)  # M/M/1: as much as it is busy
    assert mean_wait_s(1, 0.8, 1.0) == pytest.approx(4.0)  # M/M/1: load ÷ (1 - load)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.4092, abs=1e-4)
    assert mean_wait_s(2, 2.0, 1.0) == math.inf
    assert wait_quantile_s(1, 0.8, 1.0, 0.5) == pytest.approx(math.log(0.8 / 0.5) / 0.2)


def test_the_fewest_groups_that_meet_a_goal_are_found() -> None:
    needed = groups_needed(4, rate=10, service_s=1.0, goal_s=0.1)

    assert wait_quantile_s(needed * 4, 10, 1.0, 0.99) <= 0.1 < wait_quantile_s((needed - 1) * 4, 10, 1.0, 0.99)
