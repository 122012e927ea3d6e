"""`python -m serve run`: serves artifacts on this machine, with the settings that follow from options and artifacts.

`wait` precedes a server in a pod, where the artifact may be converted after the pod has started.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field

from convert.artifact import MANIFEST
from serve.callers.keys import KeyFile
from serve.catalogue.state_dir import StateDir
from serve.cli.command import expand_options, setting
from serve.cli.console import print_line, reported_errors
from serve.cli.foreground import serve_until_stopped
from serve.cli.options import StateOptions
from serve.deployment.pools.bootstrap import register
from serve.deployment.pools.bundle import Bundle, bundles_of
from serve.deployment.pools.room import check_memory, needed_rank, weights_of
from serve.deployment.settings_file import artifact_of
from serve.errors import ArtifactRefused, KeysInvalid, KeysMissing
from serve.follower.desired_state import DesiredState
from serve.observability.memory import memory_left
from serve.settings import (
    APP_NAME,
    AdmissionSettings,
    EngineSettings,
    GatewaySettings,
    LogSettings,
    OidcSettings,
    PoolSettings,
    ServeSettings,
    TracingSettings,
)

_REMIND_S = 60
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class RunOptions(StateOptions):
    """The options of `run`. An option that fills a setting takes its default, description and bounds."""

    artifacts: Annotated[
        list[Path],
        typer.Argument(
            help="Directories made by `python -m convert run`. Those for one base model share its engines; a merged "
            "model is a base model too."
        ),
    ]
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(8000, ge=1, le=65535)
    replicas: int = setting(ServeSettings, "replicas", "For each base model.")
    gpus_per_replica: float = setting(ServeSettings, "gpus_per_replica")
    base_name: list[str] | None = Field(
        None,
        description="`model` name of the base; ARTIFACT=NAME if there are several. Default: from its source. "
        "Repeatable.",
    )
    max_lora_rank: int | None = setting(
        EngineSettings, "max_lora_rank", "Default: what the given adapters need.", default=None
    )
    max_active_adapters: int = setting(EngineSettings, "max_active_adapters")
    max_resident_adapters: int = setting(EngineSettings, "max_resident_adapters")
    adapters: Path | None = Field(
        None,
        description="adapters.yaml, with pools or without: applied when the server is up, and again when it changes.",
    )
    adapter_root: list[Path] | None = setting(AdmissionSettings, "adapter_roots", "Repeatable.", default=None)
    artifact_root: list[Path] | None = setting(
        AdmissionSettings,
        "artifact_roots",
        "Repeatable. Default: the directories that hold the given artifacts, and those of pools in --adapters; none "
        "with --trusted-key.",
        default=None,
    )
    allow_other_template: bool = setting(AdmissionSettings, "allow_other_template")
    trusted_key: list[Path] | None = setting(AdmissionSettings, "trusted_keys", "Repeatable.", default=None)
    keys_file: Path | None = Field(
        None, description="Keys of callers; default: keys.json of the state directory, if `key create` made one."
    )
    open_to_all: Annotated[
        bool, typer.Option("--open", help="Require no keys, even where other machines can reach the server.")
    ] = False
    oidc_file: Path | None = Field(
        None, description="OidcSettings as JSON: an identity provider whose tokens are taken as keys too."
    )
    limits_url: str | None = setting(GatewaySettings, "limits_url")
    cors_origin: list[str] | None = setting(GatewaySettings, "cors_origins", "Repeatable.", default=None)
    max_wait: float = setting(GatewaySettings, "max_wait_s")
    keep_previous: int = setting(ServeSettings, "keep_previous")
    local_adapter_bytes: int = setting(ServeSettings, "local_adapter_bytes")
    sync_timeout: float = setting(ServeSettings, "sync_timeout_s", ge=1)
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="Port for Prometheus; default: 9464, or any if it is taken; 0: none."
    )
    metrics_host: str = Field("127.0.0.1", description="Address of that port; 0.0.0.0 for all.")
    traces: str | None = setting(TracingSettings, "endpoint")
    log_format: str = setting(LogSettings, "format", "Written to logs/ of the state directory.")
    access_sample: float = setting(LogSettings, "access_sample")
    vllm_arg: list[str] | None = Field(
        None, description="An argument for vLLM, as --vllm-arg=--max-model-len=4096. Repeatable."
    )

    def state_dir(self) -> StateDir:
        return StateDir(self.state, self.local, self.local_adapter_bytes)


def add_to(app: typer.Typer) -> None:
    """Make `run` and `wait` commands of `app`."""
    app.command(context_settings={"allow_interspersed_args": True})(run)
    app.command()(wait)


@expand_options
def run(options: RunOptions) -> None:
    """Serve artifacts on this machine until Ctrl-C or SIGTERM.

    Starts a private Ray with one vLLM engine per replica and HAProxy in front. Artifacts with an adapter share
    their 4-bit base. Each base model, and each merged model, is a pool with engines of its own, behind one address.
    Adapters that were published into --state before are served again.
    """
    with reported_errors():
        bundles = bundles_of(options.artifacts, _base_names(options.base_name or ()))
        if not options.gpus_per_replica:
            check_memory(weights_of(bundles, options.replicas), memory_left().available)
        state = options.state_dir()
        state.prepare()
        with state.claimed():
            pools = settings_of_pools(options, bundles, state)
            register(bundles, pools[0], state)
            serve_until_stopped(
                pools,
                state,
                (options.host, options.port),
                (options.metrics_host, options.metrics_port),
                options.adapters,
            )


def wait(
    artifact: Annotated[
        Path, typer.Argument(help="The directory of the artifact, or a settings file whose `engine.artifact` names it.")
    ],
    timeout_s: Annotated[float, typer.Option(min=0, help="Give up after this many seconds; 0: never.")] = 0,
) -> None:
    """Wait until an artifact is there, as the init container of a server does.

    A conversion puts its artifact there as a whole, so what is there is complete. `run` checks its files.
    """
    with reported_errors():
        directory = artifact_of(artifact) if artifact.is_file() else artifact
        if directory is None:
            return
        waited_s = 0
        while not (directory / MANIFEST).is_file():
            if timeout_s and waited_s >= timeout_s:
                raise ArtifactRefused(f"{directory} did not appear within {timeout_s:g} s. Convert it first.")
            if waited_s % _REMIND_S == 0:
                print_line(f"Waiting for {directory}: convert it with `python -m convert run`")
            time.sleep(1)
            waited_s += 1
    print_line(f"{directory} is there")


def settings_of_pools(options: RunOptions, bundles: Sequence[Bundle], state: StateDir) -> tuple[ServeSettings, ...]:
    """The settings of each pool. Raises ValidationError, KeysInvalid, KeysMissing or DesiredStateInvalid."""
    shared = _shared_settings(options, state)
    desired = DesiredState.read(options.adapters).adapters if options.adapters else ()
    wanted = state.log.read().wanted
    pools: list[PoolSettings] = []
    for bundle in bundles:
        ranks = [bundle.max_lora_rank, *(adapter.rank for adapter in desired if adapter.base == bundle.fingerprint)]
        kept = [candidate for candidate in wanted if candidate.base == bundle.fingerprint]
        pools.append(_pool(options, bundle, needed_rank(options.max_lora_rank, ranks, kept), is_first=not pools))
    return tuple(
        ServeSettings(
            **{name: getattr(pool, name) for name in PoolSettings.model_fields},
            **shared,
            other_pools=tuple(other for other in pools if other is not pool),
        )
        for pool in pools
    )


def _pool(options: RunOptions, bundle: Bundle, max_lora_rank: int, *, is_first: bool) -> PoolSettings:
    name = bundle.model_name
    return PoolSettings(
        engine=EngineSettings(
            model_path=bundle.model_path,
            model_name=name,
            fingerprint=bundle.fingerprint,
            max_lora_rank=max_lora_rank,
            max_active_adapters=options.max_active_adapters,
            max_resident_adapters=options.max_resident_adapters,
            vllm_args=tuple(options.vllm_arg or ()),
        ),
        application=APP_NAME if is_first else f"{APP_NAME}-{name}",
        route_prefix="/" if is_first else f"/pools/{name}",
        replicas=options.replicas,
    )


def _shared_settings(options: RunOptions, state: StateDir) -> dict[str, Any]:
    """What is the same for all pools. Raises ValidationError, KeysInvalid or KeysMissing."""
    oidc = _oidc_settings(options.oidc_file) if options.oidc_file else None
    log: dict[str, Any] = {"format": options.log_format, "directory": state.root / "logs"}
    return {
        "gateway": GatewaySettings(
            admin_tokens=state.admin_tokens(),
            keys_file=_keys_file(options, state, is_open=options.open_to_all or oidc is not None),
            oidc=oidc,
            limits_url=options.limits_url,
            cors_origins=tuple(options.cors_origin or ()),
            max_wait_s=options.max_wait,
        ),
        "admission": AdmissionSettings(
            adapter_roots=tuple(root.absolute() for root in options.adapter_root or ()),
            artifact_roots=_artifact_roots(options),
            allow_other_template=options.allow_other_template,
            trusted_keys=tuple(key.absolute() for key in options.trusted_key or ()),
        ),
        "log": LogSettings(access_sample=options.access_sample, **log),
        "tracing": TracingSettings(endpoint=options.traces),
        "takes_pools": True,
        "state_dir": state.root,
        "state_url": state.url,
        "gpus_per_replica": options.gpus_per_replica,
        "keep_previous": options.keep_previous,
        "local_adapter_bytes": options.local_adapter_bytes,
        "sync_timeout_s": options.sync_timeout,
    }


def _artifact_roots(options: RunOptions) -> tuple[Path, ...]:
    """Where artifacts for new pools may be: never the root of the file system, unless that was said."""
    if options.artifact_root is not None:
        return tuple(root.absolute() for root in options.artifact_root)
    if options.trusted_key:
        return ()  # a merged model has no signature, so who may add one is said, or nobody
    desired = DesiredState.read(options.adapters).pools if options.adapters else ()
    artifacts = [*options.artifacts, *(pool.artifact for pool in desired)]
    parents = dict.fromkeys(artifact.resolve().parent for artifact in artifacts)
    return tuple(parent for parent in parents if parent != Path(parent.anchor))


def _base_names(values: Iterable[str]) -> dict[Path | None, str]:
    """NAME stands for the only base model, ARTIFACT=NAME for that of an artifact."""
    names: dict[Path | None, str] = {}
    for value in values:
        artifact, separator, name = value.rpartition("=")
        names[Path(artifact) if separator else None] = name
    return names


def _keys_file(options: RunOptions, state: StateDir, *, is_open: bool) -> Path | None:
    """The file with the keys that callers must have; None if they need no key. Raises KeysInvalid or KeysMissing."""
    path = options.keys_file or (state.keys_file if state.keys_file.exists() and not is_open else None)
    if path:
        KeyFile.read(path)  # an invalid file is reported here, before every replica would report it
        return path.absolute()
    if options.host not in _LOOPBACK and not is_open:
        raise KeysMissing(options.host)
    return None


def _oidc_settings(path: Path) -> OidcSettings:
    """Raises KeysInvalid, or ValidationError."""
    try:
        return OidcSettings.model_validate_json(path.read_bytes())
    except OSError as error:
        raise KeysInvalid(f"Can't read {path}: {error.strerror}.") from error
