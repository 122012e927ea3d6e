"""The map by which HAProxy finds the pool of a request: from each name of a model to the backend of its pool.

`haproxy.sh` has HAProxy look up the `model` of a body in it. The file is what HAProxy reads when it starts; a running
one is changed through its socket. A name that HAProxy does not find, or not yet, costs one hop more: whichever replica
gets the request forwards it (serve/gateway/routing/relay.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from convert.artifact.durable_files import replace_file
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.log import CatalogueLog
from serve.catalogue.pool_changes import pools_of
from serve.observability.proxy import read
from serve.settings import PoolSettings, ServeSettings

# No model can have this name. Its entry says that there are several pools; the names of pools are read only then.
SEVERAL_POOLS = "*"
# A proxy that was being replaced when the map changed may have read the older file.
_COMPARE_S = 5.0
_TIMEOUT_S = 2.0
_NAMES_PER_COMMAND = 100  # HAProxy takes 16 KiB at once


class ProxyMap:
    """Keeps the file and the running proxies of this machine up to date."""

    def __init__(self, path: Path, sockets: Path, settings: ServeSettings, log: CatalogueLog) -> None:
        """`sockets`: the directory of Ray Serve's files for HAProxy, one directory below it for each proxy. `settings`:
        of any pool that the server was started with."""
        self._path = path
        self._sockets = sockets
        self._log = log
        self._settings = settings
        self._catalogue = Catalogue()
        self._written: Mapping[str, str] | None = None
        self._compared_s = 0.0

    def update(self) -> None:
        """Follow the catalogue. Raises StoreUnavailable if it can't be read."""
        self._catalogue = self._log.follow(self._catalogue)
        names = self._backends()
        changed = names != self._written
        if changed:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, "".join(f"{name} {backend}\n" for name, backend in names.items()).encode())
            self._written = names
        if changed or time.monotonic() - self._compared_s > _COMPARE_S:
            self._compared_s = time.monotonic()
            for proxy in self._sockets.glob("*/admin.sock"):
                self._change(proxy, names)

    def _backends(self) -> dict[str, str]:
        """The backend of each name. Nothing with a single pool: HAProxy then reads no body (see `haproxy.sh`)."""
        pools = pools_of(self._settings, self._catalogue)
        if len(pools) == 1:
            return {}
        pools = tuple(pool for pool in pools if not pool.asleep)  # whoever gets the request wakes the others
        by_base = {pool.engine.fingerprint: backend_of(pool) for pool in pools}
        states = self._catalogue.adapters.items()
        adapters = {name: by_base[base] for name, state in states for base in state.live_bases if base in by_base}
        base_models = {pool.engine.model_name: backend_of(pool) for pool in pools}
        moved = {name: base_models[state.pool] for name, state in states if state.pool in base_models}
        return {SEVERAL_POOLS: "yes", **adapters, **moved, **base_models}

    def _change(self, proxy: Path, names: Mapping[str, str]) -> None:
        known = dict(line.split(" ", 2)[1:] for line in _ask(proxy, f"show map {self._path}").splitlines() if line)
        commands = [f"del map {self._path} {name}" for name in known.keys() - names.keys()]
        for name, backend in names.items():
            if known.get(name) != backend:
                commands.append(f"{'set' if name in known else 'add'} map {self._path} {name} {backend}")
        for first in range(0, len(commands), _NAMES_PER_COMMAND):
            _ask(proxy, ";".join(commands[first : first + _NAMES_PER_COMMAND]))


def backend_of(pool: PoolSettings) -> str:
    """What Ray Serve calls the pool in HAProxy's configuration."""
    return f"http-{pool.application}"


def _ask(proxy: Path, command: str) -> str:
    """The answer to a command of HAProxy's runtime API; nothing if the proxy is being replaced."""
    try:
        return read(proxy, f"{command}\n".encode(), time.monotonic() + _TIMEOUT_S)
    except OSError:
        return ""
