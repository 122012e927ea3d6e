"""Settings of metrics, logs and traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from serve.settings.frozen import FrozenSettings


class MetricsSettings(FrozenSettings):
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


class LogSettings(FrozenSettings):
    """Logs of a replica."""

    format: Literal["json", "text"] = Field(
        "json", description="Format of the replicas' logs: json, one document a line, or text."
    )
    directory: Path | None = Field(
        None, description="Where each replica writes REPLICA.log, rotated at 32 MiB; none: the standard error stream."
    )
    stream: Path | None = Field(
        None,
        description="What to write to in place of the standard error stream, which Ray takes into its own files: in a "
        "container /proc/1/fd/2, which `kubectl logs` shows.",
    )
    access_sample: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="Share of responses below 500 that get a line in the log; responses of 500 and more always do."
    )


class TracingSettings(FrozenSettings):
    """Traces over OTLP."""

    endpoint: str | None = Field(
        None, description="URL of an OTLP receiver, as http://HOST:4318/v1/traces; none: no traces."
    )
    sample: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="Share of requests that are traced, unless their caller has decided."
    )
