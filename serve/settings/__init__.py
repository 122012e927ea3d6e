"""All settings, read once, checked whole, then frozen."""

from __future__ import annotations

from serve.settings.callers import Allowance, Grant, OidcSettings, SecretDigest
from serve.settings.engine import (
    POOL_VLLM_ARGS,
    REFUSED_VLLM_ARGS,
    RESERVED_SLOTS,
    EngineSettings,
    supported_rank,
)
from serve.settings.gateway import GatewaySettings
from serve.settings.observability import LogSettings, MetricsSettings, TracingSettings
from serve.settings.server import (
    APP_NAME,
    LOCAL_ADAPTER_BYTES,
    NO_POOL_OPTIONS,
    AdmissionSettings,
    PoolOptions,
    PoolSettings,
    ServeSettings,
)

__all__ = [
    "APP_NAME",
    "LOCAL_ADAPTER_BYTES",
    "NO_POOL_OPTIONS",
    "POOL_VLLM_ARGS",
    "REFUSED_VLLM_ARGS",
    "RESERVED_SLOTS",
    "AdmissionSettings",
    "Allowance",
    "EngineSettings",
    "GatewaySettings",
    "Grant",
    "LogSettings",
    "MetricsSettings",
    "OidcSettings",
    "PoolOptions",
    "PoolSettings",
    "SecretDigest",
    "ServeSettings",
    "TracingSettings",
    "supported_rank",
]
