"""Settings of a whole server, and of the adapters that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from serve.settings.engine import EngineSettings, PoolVllmArgs
from serve.settings.frozen import FrozenSettings
from serve.settings.gateway import GatewaySettings
from serve.settings.observability import LogSettings, MetricsSettings, TracingSettings

LOCAL_ADAPTER_BYTES = 8 << 30


class AdmissionSettings(FrozenSettings):
    """The conditions for an adapter to be served."""

    adapter_roots: tuple[Path, ...] = Field(
        (), description="Directories in which callers of the admin API may name adapters; none: no paths are taken."
    )
    artifact_roots: tuple[Path, ...] = Field(
        (),
        description="Directories in which callers of the admin API may name artifacts for new pools; none: no pools.",
    )
    max_adapter_bytes: PositiveInt = Field(4 << 30, description="Larger adapters are refused.")
    allow_other_template: bool = Field(
        False, description="Take adapters that bring another tokenizer or chat template than the base model's."
    )
    trusted_keys: tuple[Path, ...] = Field(
        (),
        description="Public keys (Ed25519, PEM): an adapter that none of them signed is refused; none: all are taken.",
    )
    least_change_nats: NonNegativeFloat = Field(
        0.005, description="A new revision must change some log-probability of a probe by more than this; 0: no probe."
    )
    golden_tolerance_nats: PositiveFloat = Field(
        0.25, description="Largest mean distance of an adapter's log-probabilities from its golden answers, in nats."
    )


APP_NAME = "graft"


class PoolOptions(FrozenSettings):
    """What a pool that is added to a running server may have of its own."""

    max_active_adapters: PositiveInt | None = Field(None, description="Default: that of the server.")
    max_resident_adapters: PositiveInt | None = Field(None, description="Default: that of the server.")
    vllm_args: PoolVllmArgs = Field((), description="Passed to vLLM after those of the server, which they override.")
    sleep_after_s: Annotated[float, Field(ge=5)] | None = Field(
        None,
        description="Its engines are stopped when none of them has had a request for this long. The next request "
        "starts them, and waits. Default: they keep running.",
    )

    @classmethod
    def of(cls, settings: PoolOptions) -> PoolOptions:
        """These fields alone, of a subclass that has more."""
        return cls(**{name: getattr(settings, name) for name in cls.model_fields})

    def override(self, engine: EngineSettings) -> EngineSettings:
        """The server's settings of the engine with those of the pool. vLLM takes the last of repeated arguments."""
        own = {name: getattr(self, name) for name in ("max_active_adapters", "max_resident_adapters")}
        changed = {name: value for name, value in own.items() if value is not None}
        return engine.model_copy(update={**changed, "vllm_args": (*engine.vllm_args, *self.vllm_args)})


NO_POOL_OPTIONS = PoolOptions()


class PoolSettings(FrozenSettings):
    """A pool: one base model or merged model, in an application of Ray Serve of its own."""

    engine: EngineSettings
    application: str = Field(APP_NAME, description="The pool's application of Ray Serve.")
    route_prefix: Annotated[str, Field(pattern=r"^/(.*[^/])?$")] = Field(
        "/", description="What the paths of that application begin with. The pool at `/` gets requests for all others."
    )
    replicas: PositiveInt = Field(1, description="Engines, each a process of its own with the whole model.")
    sleep_after_s: float | None = Field(None, description="For an added pool: see PoolOptions.")
    asleep: bool = Field(False, description="Its engines are stopped until a request comes.")
    woken_at: AwareDatetime | None = Field(None, description="When a request ended its last sleep.")
    added: bool = Field(False, description="It was added while the server ran; the others are served until it stops.")


class ServeSettings(PoolSettings):
    """One pool of a server, and what all pools of the server share."""

    other_pools: tuple[PoolSettings, ...] = Field(
        (),
        description="The other pools that the server was started with, which share its catalogue, keys, limits and "
        "usage. Those that were added later are in the catalogue.",
    )
    takes_pools: bool = Field(
        False, description="A process of the server starts and stops pools as the catalogue says: `run` does."
    )
    gateway: GatewaySettings
    admission: AdmissionSettings = AdmissionSettings()
    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()
    tracing: TracingSettings = TracingSettings()
    state_dir: Path = Field(description="Catalogue and adapter store, shared by all replicas.")
    state_url: str | None = Field(
        None,
        description="An object store that holds them for many machines; state_dir then has this machine's own files.",
    )
    local_adapter_bytes: PositiveInt = Field(
        LOCAL_ADAPTER_BYTES,
        description="With state_url: bytes of adapters that this machine keeps copies of; what its engines hold stays.",
    )
    cpus_per_replica: NonNegativeFloat = Field(1, description="Ray's reservation per replica.")
    gpus_per_replica: NonNegativeFloat = Field(0, description="GPUs for each engine; 0 runs on the CPU.")
    max_ongoing_requests: PositiveInt = Field(
        4096, description="Requests that a replica has open: those that run, wait, or still arrive."
    )
    catalogue_poll_s: PositiveFloat = Field(
        1.0, description="A replica that missed a notification follows the catalogue after at most this long."
    )
    drift_check_s: PositiveFloat = Field(
        5.0, description="How often a replica compares what its engine holds with what it should."
    )
    keep_previous: Annotated[int, Field(ge=0)] = Field(
        1, description="Revisions before the current one that stay resident, so that a rollback loads nothing."
    )
    sync_timeout_s: PositiveFloat = Field(
        60.0, description="Seconds after which a publish gives up on a replica that does not answer."
    )
    drain_s: PositiveFloat = Field(20.0, description="Running requests get this long when a replica stops.")

    @property
    def all_engines(self) -> int:
        """The engines of the pools that the server was started with."""
        return self.replicas + sum(pool.replicas for pool in self.other_pools)
