from __future__ import annotations

from pathlib import Path

import pytest

from serve.deployment.proxy import environment as proxy_environment
from serve.deployment.ray_environment import environment
from serve.errors import ProxyScriptUnusable
from serve.settings import EngineSettings, GatewaySettings, PoolSettings, ServeSettings


def settings_in(directory: Path) -> ServeSettings:
    return ServeSettings(
        engine=EngineSettings(model_path=directory, model_name="m", fingerprint="0" * 64),
        gateway=GatewaySettings(admin_tokens={}),
        state_dir=directory,
    )


def ports(directory: Path) -> tuple[set[int], range]:
    """The single ones, and those of the replicas."""
    ports_by_name = {
        name: int(value)
        for name, value in environment(directory, settings_in(directory)).items()
        if name.endswith("_PORT")
    }
    replicas = [ports_by_name.pop(f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT") for end in ("MIN", "MAX")]
    return set(ports_by_name.values()), range(replicas[0], replicas[1] + 1)


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


def test_the_proxy_is_given_a_map_of_models_and_the_engines_their_share_of_the_cores_with_several_pools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    one = settings_in(tmp_path)
    other = PoolSettings(engine=one.engine.model_copy(update={"fingerprint": "1" * 64}), replicas=3)

    variables = environment(tmp_path, one.model_copy(update={"other_pools": (other,)}))
    assert variables["GRAFT_POOLS"] == str(proxy_environment.map_of_models(tmp_path))
    assert variables["OMP_NUM_THREADS"] == "2"


def test_memory_of_another_program_ends_no_part_of_a_server(tmp_path: Path) -> None:
    variables = environment(tmp_path, settings_in(tmp_path))

    assert variables["RAY_memory_monitor_refresh_ms"] == "0", "the monitor would kill all workers at once"
    assert variables["RAY_worker_oom_score_adjustment"] == "0", "the kernel would prefer workers to any other process"


def test_no_server_starts_without_the_script_that_closes_the_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "haproxy.sh"
    script.write_bytes(proxy_environment.HAPROXY_SCRIPT.read_bytes())
    script.chmod(0o644)
    monkeypatch.setattr(proxy_environment, "HAPROXY_SCRIPT", script)

    with pytest.raises(ProxyScriptUnusable, match=r"haproxy\.sh"):
        environment(tmp_path, settings_in(tmp_path))
