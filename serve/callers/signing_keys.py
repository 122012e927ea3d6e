"""The public keys of an identity provider. They are fetched in the background, never by a request, and stay in force
while the provider is away.

One fetch runs at a time, and two fetches begin at least some seconds apart, whatever is asked: anyone can send tokens
that name keys which nobody has.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from pathlib import Path

import httpx
import jwt

from serve.errors import IssuerUnavailable
from serve.settings import OidcSettings

_REFRESH_S = 300.0  # while the issuer answers, a key that it has withdrawn is refused after this long
_RETRY_S = 10.0  # from the beginning of one fetch to that of the next
_RETRY_WITHOUT_KEYS_S = 2.0  # the same while every token has to be refused
_FETCH_TIMEOUT_S = 5.0
_MAX_WAIT_S = 1.0  # of a request for the fetch that may know its key
_TICK_S = 1.0

logger = logging.getLogger(__name__)


class SigningKeys:
    """The keys of one issuer, as its settings name it."""

    def __init__(self, settings: OidcSettings) -> None:
        self.failures = 0  # of all fetches
        self._settings = settings
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._fetched_s = self._tried_s = -math.inf  # times are those of the event loop
        self._fetching: asyncio.Task[None] | None = None
        self._away_since_s: float | None = None

    @property
    def age_s(self) -> float | None:
        """How long ago the keys were fetched; None if they never were."""
        return _now() - self._fetched_s if self._keys else None

    async def keep_fresh(self) -> None:
        """Fetches the keys now, and again before they are old. Never returns."""
        while True:
            self._fetch_if_due()
            await asyncio.sleep(_TICK_S)

    def has(self, kid: str) -> bool:
        return kid in self._in_force

    async def find(self, kid: str) -> jwt.PyJWK | None:
        """The key with that id; None if the issuer has none. A key that is known is returned at once. For another one,
        a fetch begins if the last one is long enough ago, and is waited for, but only a second. Raises
        IssuerUnavailable if nobody can say whether there is such a key, because the issuer does not answer."""
        self._fetch_if_due(kid)
        key = self._in_force.get(kid)
        if key is None and self._fetching:
            await asyncio.wait({self._fetching}, timeout=_MAX_WAIT_S)
            key = self._in_force.get(kid)
        if key is None and self._is_unanswered:
            raise IssuerUnavailable(math.ceil(max(1.0, self._next_s - _now())))
        return key

    @property
    def _in_force(self) -> Mapping[str, jwt.PyJWK]:
        return self._keys if _now() - self._fetched_s <= self._settings.jwks_max_age_s else {}

    @property
    def _is_unanswered(self) -> bool:
        return self._fetching is not None or self._away_since_s is not None or not self._in_force

    @property
    def _next_s(self) -> float:
        """The earliest time of the next fetch."""
        return self._tried_s + (_RETRY_S if self._in_force else _RETRY_WITHOUT_KEYS_S)

    def _fetch_if_due(self, kid: str | None = None) -> None:
        """Begins a fetch if the keys get old, or none of them has the id `kid`."""
        now = _now()
        is_wanted = now - self._fetched_s >= _REFRESH_S or (kid is not None and not self.has(kid))
        if is_wanted and self._fetching is None and now >= self._next_s:
            self._tried_s = now
            self._fetching = asyncio.create_task(self._fetch())

    async def _fetch(self) -> None:
        began_s = _now()
        try:
            async with asyncio.timeout(_FETCH_TIMEOUT_S):  # httpx has limits for parts of a response, and none for all
                self._keys = _by_id(await self._read())
            self._fetched_s = began_s
            self._log_return()
        except Exception as error:  # whatever it is, it may be over at the next attempt
            self.failures += 1
            self._log_outage(error)
        finally:
            self._fetching = None

    async def _read(self) -> str:
        location = self._settings.jwks
        if "://" not in location:
            return await asyncio.to_thread(Path(location).read_text)
        # Reading the certificates takes some 50 ms, for which no other request shall wait.
        certificates = await asyncio.to_thread(httpx.create_ssl_context)
        # The provider may be outside, where the environment's proxy is the way.
        async with httpx.AsyncClient(timeout=_FETCH_TIMEOUT_S, verify=certificates) as client:
            response = await client.get(location)
            response.raise_for_status()
            return response.text

    def _log_return(self) -> None:
        if self._away_since_s is not None:
            away_s = _now() - self._away_since_s
            logger.info("the keys of %s were fetched again, after %.0f s", self._settings.issuer, away_s)
        self._away_since_s = None

    def _log_outage(self, error: Exception) -> None:
        """Log an outage once, when it begins, and once more if it outlasts the keys."""
        issuer = self._settings.issuer
        if self._keys and not self._in_force:
            self._keys = {}
            logger.error("the keys of %s are too old to be used, its tokens can't be checked: %r", issuer, error)
        elif self._away_since_s is None:
            consequence = "those that it had stay in force" if self._keys else "its tokens can't be checked"
            logger.error("the keys of %s can't be fetched, %s: %r", issuer, consequence, error)
        if self._away_since_s is None:
            self._away_since_s = _now()


def _by_id(document: str) -> Mapping[str, jwt.PyJWK]:
    """The keys of a JSON Web Key Set that can verify signatures, by `kid`. Raises ValueError or PyJWTError if there are
    none."""
    keys = jwt.PyJWKSet.from_json(document).keys
    usable = {str(key.key_id): key for key in keys if key.key_id and key.public_key_use in (None, "sig")}
    if not usable:
        raise ValueError("none of its keys is for signatures and has a `kid`")
    return usable


def _now() -> float:
    return asyncio.get_running_loop().time()
