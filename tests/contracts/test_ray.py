"""What serve.deployment uses of Ray and Ray Serve beyond what they document: names, signatures, variables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serve.deployment.ray_environment import environment, ignored_variables
from serve.deployment.ray_patches import IDLE_PROCESSES
from serve.deployment.ray_replicas import SERVING_STATES
from serve.settings import EngineSettings, GatewaySettings, ServeSettings
from tests.contracts.contract import Contract, Library
from tests.contracts.own_files import undeclared_attributes
from tests.contracts.renamed import names_of, with_renamed

CONTRACT: Contract = {
    "ray._private.worker:init": (
        *("address", "num_cpus", "include_dashboard", "object_store_memory", "logging_level", "log_to_driver"),
        "**",  # _node_ip_address and _temp_dir, see below
    ),
    "ray._private.worker:shutdown": (),
    "ray._private.state:nodes": (),
    "ray._private.state:cluster_resources": (),
    "ray.runtime_context:RuntimeContext.get_node_id": (),
    "ray.serve.api:start": ("http_options", "proxy_location", "**"),
    "ray.serve.api:status": (),
    "ray.serve.api:delete": ("name", "/", "_blocking"),
    "ray.serve.api:shutdown": (),
    "ray.serve.api:ingress": (),
    "ray.serve.api:get_replica_context": (),
    "ray.serve.api:get_deployment_handle": ("deployment_name", "app_name", "/"),
    "ray.serve.context:_get_global_client": (),
    "ray.serve.context:ReplicaContext": ("app_name", "replica_id"),
    "ray.serve._private.client:ServeControllerClient.deploy_apps": ("config", "/"),
    "ray._common.tls_utils:add_port_to_grpc_server": ("server", "address", "/"),
    "ray.serve._private.replica": ("add_port_to_grpc_server",),
    "ray.serve._private.common:ReplicaID": ("unique_id",),
    "ray.serve._private.common:ReplicaState": SERVING_STATES,
    "ray.serve._private.constants": ("SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER",),
    "ray.serve.handle:DeploymentHandle.broadcast": ("method_name", "/", "*", "**"),
    "ray.serve.handle:DeploymentBroadcastResponse.results_async": ("timeout_s",),
    "ray.serve.schema:ServeDeploySchema": ("applications",),
    "ray.serve.schema:ServeStatus": ("applications",),
    "ray.serve.schema:ApplicationStatusOverview": ("status", "message", "deployments"),
    "ray.serve.schema:DeploymentStatusOverview": ("message", "replica_states"),
    "ray.serve.schema:LoggingConfig": ("log_level", "enable_access_log"),
}
# Names that stand in the source as texts: keyword arguments, hooks, processes, the word that ends a wait.
TEXTS = {
    "ray._private.worker": ('kwargs.pop("_node_ip_address"', 'kwargs.pop("_temp_dir"'),
    "ray._private.services": (
        *(f'"{script.removeprefix("/")}"' for script in IDLE_PROCESSES),
        "if not ray_constants.ENABLE_RAY_CLUSTER",
    ),
    "ray.serve._private.replica": (
        'SERVE_BUILD_ASGI_APP_METHOD = "__serve_build_asgi_app__"',
        "add_port_to_grpc_server(self._server",
    ),
    "ray.serve._private.common": ('RUNNING = "RUNNING"', 'DEPLOY_FAILED = "DEPLOY_FAILED"', 'UNHEALTHY = "UNHEALTHY"'),
    "ray.serve._private.constants": ('DISCONNECT_DISABLED_HEADER = "x-request-disconnect-disabled"',),
}
DEPLOYMENT = Path(__file__).parents[2] / "serve" / "deployment"


def missing_texts(library: Library) -> list[str]:
    files = {module: library.file_of(module) for module in TEXTS}
    return [
        f"{module} doesn't contain {text}"
        for module, texts in TEXTS.items()
        for text in texts
        if (file := files[module]) is None or text not in file.read_text(encoding="utf-8")
    ]


def test_ray_has_what_the_deployment_uses() -> None:
    assert Library("ray").broken(CONTRACT) == []
    assert missing_texts(Library("ray")) == []


@pytest.mark.parametrize(("entry", "module", "name"), sorted(names_of(CONTRACT)))
def test_a_renamed_name_is_noticed(entry: str, module: str, name: str, tmp_path: Path) -> None:
    with_renamed(Library("ray"), tmp_path, module, name)

    assert Library("ray", overlay=tmp_path).broken({entry: CONTRACT[entry]})


@pytest.mark.parametrize(("module", "text"), [(module, text) for module, texts in TEXTS.items() for text in texts])
def test_a_renamed_text_is_noticed(module: str, text: str, tmp_path: Path) -> None:
    last_word = re.findall(r"\w+", text)[-1]
    with_renamed(Library("ray"), tmp_path, module, last_word)

    assert missing_texts(Library("ray", overlay=tmp_path))


def test_private_names_of_ray_are_in_the_contract() -> None:
    files = [DEPLOYMENT / f"{name}.py" for name in ("app", "local", "ray_patches", "ray_replicas")]

    assert undeclared_attributes(files, CONTRACT) == []


def variables(directory: Path) -> dict[str, str]:
    settings = ServeSettings(
        engine=EngineSettings(model_path=directory, model_name="m", fingerprint="0" * 64),
        gateway=GatewaySettings(admin_tokens={}),
        state_dir=directory,
    )
    return environment(directory, settings)


def test_ray_reads_every_variable_that_is_set_for_it(tmp_path: Path) -> None:
    names = [name for name in variables(tmp_path) if name.startswith("RAY_")]

    assert len(names) > 25
    assert ignored_variables(names) == []


def test_a_variable_that_ray_ignores_is_noticed_for_each_that_is_set(tmp_path: Path) -> None:
    renamed = [f"{name}X" for name in variables(tmp_path) if name.startswith("RAY_")]

    assert ignored_variables([*renamed, "PATH"]) == sorted(renamed)
