"""All settings, read once, checked whole, then frozen."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from convert.artifact import VLLM_LORA_RANKS, Name, Sha256

# Arguments of vLLM that would change what Graft itself sets (the model, its names, its adapters), let others reach the
# engine past the gateway, or run code that came with a model. serve.engine.vllm_contract names them too.
REFUSED_VLLM_ARGS = frozenset({
    "--allow-credentials", "--api-key", "--code-revision", "--config", "--enable-lora", "--hf-overrides",
    "--host", "--lora-modules", "--max-cpu-loras", "--max-lora-rank", "--max-loras", "--middleware", "--model",
    "--port", "--root-path", "--served-model-name", "--tokenizer", "--trust-remote-code", "--uds",
    "--worker-extension-cls",
})  # fmt: skip
# Engine slots beside `max_active_adapters`: in it new revisions are checked while requests hold all others.
RESERVED_SLOTS = 1
# The name of an argument without what follows it: vLLM's parser takes `--a_b=1`, `--a-b.key=1` and `--a-b+ 1` too.
_ARGUMENT = re.compile(r"--[\w-]*")
_NOTHING = sha256().hexdigest()


def _not_of_nothing(digest: str) -> str:
    if digest == _NOTHING:
        raise ValueError("it is the SHA-256 of an empty text, which everybody knows")
    return digest


# The SHA-256 of a secret that callers send.
SecretDigest = Annotated[Sha256, AfterValidator(_not_of_nothing)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineSettings(_Settings):
    """What one engine serves, and how much room its adapters get."""

    model_path: Path = Field(description="Directory of the base model, or of the merged model.")
    model_name: Name = Field(description="What clients write as `model` to reach it without an adapter.")
    fingerprint: Sha256 = Field(description="Identity of the base model; adapters must be made for it.")
    max_lora_rank: Annotated[int, Field(ge=0, le=512)] = Field(
        16, description="Largest adapter rank; 0 runs the engine without adapters."
    )
    max_active_adapters: PositiveInt = Field(
        4, description="Engine slots: different adapters that run at a time and that one batch may mix."
    )
    max_resident_adapters: PositiveInt = Field(16, description="Adapters that an engine keeps in host memory.")
    vllm_args: tuple[str, ...] = Field((), description="Passed to vLLM's own argument parser as they are.")

    @property
    def adapter_capacity(self) -> int:
        """Adapters the engine holds: one more than may run, so that a publish finds a place under any load."""
        return max(self.max_resident_adapters, self.max_active_adapters + 1)

    @field_validator("vllm_args")
    @classmethod
    def _refuse_reserved(cls, args: tuple[str, ...]) -> tuple[str, ...]:
        names = {match[0].replace("_", "-") for arg in args if (match := _ARGUMENT.match(arg))}
        if refused := sorted(REFUSED_VLLM_ARGS & names):
            raise ValueError(f"{', '.join(refused)} can't be passed to vLLM: Graft sets it, or it would be unsafe")
        return args


class Allowance(_Settings):
    """Limits of a caller, or of a caller on one model; None means no limit."""

    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = Field(None, description="Prompt and completion together.")
    concurrent_requests: PositiveInt | None = None

    @property
    def is_unlimited(self) -> bool:
        return self == _UNLIMITED


_UNLIMITED = Allowance()


class Grant(_Settings):
    """What a caller may do."""

    models: tuple[str, ...] = Field(("*",), description="Patterns of names; * and ? as in a shell.")
    admin: bool = Field(False, description="May use the admin API.")
    limits: Allowance = Field(_UNLIMITED, description="Limits of all requests of the caller together.")
    limits_per_model: dict[str, Allowance] = Field(
        {},
        description="Pattern → limits for each model that matches, by itself; the first pattern that matches holds.",
    )

    def may_use(self, model: str) -> bool:
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    def limits_of(self, model: str) -> Allowance:
        """The limits of the caller on this one model, besides those of all its requests."""
        fit = (limits for pattern, limits in self.limits_per_model.items() if fnmatchcase(model, pattern))
        return next(fit, _UNLIMITED)


class OidcSettings(_Settings):
    """Tokens of an identity provider that callers may send instead of keys."""

    issuer: str = Field(description="Issuer that a token must have: its `iss`.")
    audience: str = Field(description="Audience that a token must have: its `aud`.")
    jwks: str = Field(description="Public keys of the issuer: an https:// URL, or a file.")
    jwks_max_age_s: float = Field(86400.0, ge=600, description="Of its last public keys while it doesn't answer.")
    algorithms: tuple[Literal["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"], ...] = Field(
        ("RS256", "ES256"), description="Accepted signature algorithms, whatever a token's header says."
    )
    caller_claim: str = Field("sub", description="The claim that names the caller.")
    role_claim: str = Field("roles", description="The claim with the caller's roles: a list, or one string of words.")
    roles: dict[str, Grant] = Field(
        description="Role → grant. The first role here that a token has counts; a token with none of them is refused."
    )

    @field_validator("jwks")
    @classmethod
    def _be_safe(cls, jwks: str) -> str:
        if jwks.startswith("http://") and not jwks.startswith(("http://127.0.0.1:", "http://localhost:")):
            raise ValueError("keys that come over http:// could be anyone's: use https://")
        return jwks


class GatewaySettings(_Settings):
    """The HTTP side of a replica."""

    max_body_bytes: PositiveInt = Field(32 << 20, description="Larger request bodies get a 413.")
    max_waiting_requests: PositiveInt = Field(
        128, description="Requests that may wait for an adapter slot of one replica, or for its engine; more get a 503."
    )
    max_waiting_per_caller: PositiveInt = Field(64, description="Of one caller; more get a 429.")
    max_wait_s: PositiveFloat = Field(
        30.0, description="A request that got no slot, or no place in the engine, for this long gets a 503."
    )
    max_run_s: PositiveFloat = Field(
        600.0, description="A request that has run in the engine for this long is ended, with a 504 or in its stream."
    )
    max_running_requests: PositiveInt | None = Field(
        None, description="Requests in a replica's engine at a time; default: vLLM's max_num_seqs less one, for checks."
    )
    max_output_tokens: PositiveInt | None = Field(
        None, description="Most output tokens of one answer: a request for more gets a 400. It is also the default."
    )
    body_timeout_s: PositiveFloat = Field(30.0, description="A body that has not arrived by then gets a 408.")
    send_timeout_s: PositiveFloat = Field(
        60.0, description="The request of a client that reads nothing of its response for this long is cancelled."
    )
    adapter_turn_s: PositiveFloat = Field(
        1.0, description="While others wait, an adapter takes new requests for this long, then gives its slot away."
    )
    admin_tokens: dict[str, SecretDigest] = Field(
        description="SHA-256 of every bearer token of the admin API by its label, which history names as the author."
    )
    keys_file: Path | None = Field(
        None, description="Keys of the callers, followed while it changes; none: everyone may use every model."
    )
    oidc: OidcSettings | None = Field(None, description="An identity provider whose tokens are taken as keys too.")
    limits_url: str | None = Field(
        None, description="A Redis that counts the limits of keys, as redis://HOST:PORT/0; none: this Ray's memory."
    )
    limits_when_unavailable: Literal["refuse", "allow"] = Field(
        "refuse", description="What a caller with limits gets while they can't be counted: a 503, or no limits."
    )
    lease_s: Annotated[float, Field(ge=0.5)] = Field(
        15.0, description="A replica that died gives the concurrent requests of its callers back after this long."
    )
    usage_flush_s: PositiveFloat = Field(5.0, description="How often usage is written; a killed replica loses so much.")
    cors_origins: tuple[str, ...] = Field(
        (), description="Origins of web pages that may call from a browser; `*` for all; none: no CORS."
    )

    @property
    def knows_callers(self) -> bool:
        """Whether requests are authenticated: only callers with a key or a token are served."""
        return bool(self.keys_file or self.oidc)


class AdmissionSettings(_Settings):
    """The conditions for an adapter to be served."""

    adapter_roots: tuple[Path, ...] = Field(
        (), description="Directories in which callers of the admin API may name adapters; none: no paths are taken."
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


class MetricsSettings(_Settings):
    """Metrics of a replica, which the exporter of its node collects."""

    directory: Path | None = Field(
        None, description="Where replicas of a node have their sockets, which its exporter reads; none: no metrics."
    )
    max_adapters: PositiveInt = Field(
        100, description="Adapters that have series of their own: the busiest. The rest is counted as `(other)`."
    )
    requests_info: bool = Field(
        False, description="Also vllm:lora_requests_info: a new series for each set of adapters."
    )
    identity_check_s: NonNegativeFloat = Field(
        30.0, description="How often one adapter's answer is compared with its answer when it was loaded; 0: never."
    )


class LogSettings(_Settings):
    """Logs of a replica."""

    format: Literal["json", "text"] = Field(
        "json", description="Format of the replicas' logs: json, one document a line, or text."
    )
    directory: Path | None = Field(
        None, description="Where each replica writes REPLICA.log, rotated at 32 MiB; none: the standard error stream."
    )
    access_sample: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="Share of responses below 500 that get a line in the log; responses of 500 and more always do."
    )


class TracingSettings(_Settings):
    """Traces over OTLP."""

    endpoint: str | None = Field(
        None, description="URL of an OTLP receiver, as http://HOST:4318/v1/traces; none: no traces."
    )
    sample: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="Share of requests that are traced, unless their caller has decided."
    )


class ServeSettings(_Settings):
    """One base model behind one Ray Serve application."""

    engine: EngineSettings
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
    replicas: PositiveInt = Field(1, description="Engines, each a process of its own with the whole model.")
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


def supported_rank(rank: int) -> int:
    """The smallest rank of vLLM's list that holds adapters of `rank`; raises ValueError above the largest."""
    for supported in VLLM_LORA_RANKS:
        if rank <= supported:
            return supported
    raise ValueError(f"rank {rank} is above {VLLM_LORA_RANKS[-1]}, the largest that vLLM serves")
