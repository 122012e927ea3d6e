from __future__ import annotations

from pathlib import Path

from serve.config import EngineSettings, GatewaySettings, ServeSettings
from serve.local import environment


def ports(directory: Path) -> tuple[set[int], range]:
    """The single ones, and those of the replicas."""
    settings = ServeSettings(
        engine=EngineSettings(model_path=directory, model_name="m", fingerprint="0" * 64),
        gateway=GatewaySettings(admin_tokens={}),
        state_dir=directory,
    )
    found = {name: int(value) for name, value in environment(directory, settings).items() if name.endswith("_PORT")}
    replicas = [found.pop(f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT") for end in ("MIN", "MAX")]
    return set(found.values()), range(replicas[0], replicas[1] + 1)


def test_two_servers_of_one_machine_listen_on_no_port_of_each_other(tmp_path: Path) -> None:
    """Ray's own choices are constants, and some of its parts share a port with whoever has it already."""
    drawn = [ports(tmp_path) for _ in range(20)]

    assert len({replicas.start for _, replicas in drawn}) > 10, "by chance now and then the same"
    for single, replicas in drawn:
        assert len(single) == 3
        assert len(replicas) > 90
        every = sorted({*single, *replicas})
        assert every == list(range(every[0], every[0] + 100))
        assert every[0] >= 20_000
        assert every[-1] < 32_768, "below those that the system gives away"
