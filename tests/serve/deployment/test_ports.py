from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from serve.deployment.ports import check_port, free_block, free_port
from serve.errors import PortInUse


@pytest.fixture
def taken() -> Iterator[int]:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        yield port


def test_a_row_of_ports_has_none_in_it_that_somebody_listens_on(taken: int) -> None:
    for _ in range(20):
        assert free_block(2, range(taken - 2, taken + 4)) in (range(taken - 2, taken), range(taken + 2, taken + 4))


def test_no_free_row_is_told(taken: int) -> None:
    with pytest.raises(PortInUse, match=f"No 2 free ports in a row between {taken} and {taken + 2}"):
        free_block(2, range(taken, taken + 2))


def test_a_port_that_is_taken_is_told_with_the_option_that_chooses_another(taken: int) -> None:
    with pytest.raises(
        PortInUse, match=f"127.0.0.1:{taken}: Address already in use. Choose another with --metrics-port"
    ):
        check_port("127.0.0.1", taken, "--metrics-port")


def test_a_free_port_is_none_that_the_system_lends_to_outgoing_connections() -> None:
    """One of those may be lent to somebody else before it is listened on."""
    assert all(10_000 <= free_port() < 20_000 for _ in range(50))
