"""An identity provider that is away, slow, or has new keys: a real server, real tokens, and time that is skipped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serve.callers import signing_keys
from serve.callers.oidc import Issuer
from serve.deployment.metrics_collector import MetricsCollector
from serve.errors import IssuerUnavailable
from serve.observability.recorder import MetricsRecorder
from serve.settings import EngineSettings, GatewaySettings, ServeSettings
from tests.serve.callers.provider import EC, OTHER_RSA, Provider, settings, token
from tests.serve.conftest import BASE
from tests.serve.guarded import until
from tests.serve.virtual_time import skip

pytestmark = pytest.mark.skippable_time

DAY_S = 86_400.0


@pytest.fixture
async def issuer(provider: Provider) -> Issuer:
    """One that has fetched its keys."""
    issuer = Issuer(settings(provider.url))
    while not issuer.keys.has("rsa"):  # a request waits for a second, which is too short on a busy machine
        with contextlib.suppress(IssuerUnavailable):
            assert await issuer.find(token())
        await asyncio.sleep(0.01)
    return issuer


@pytest.fixture
async def kept_fresh(issuer: Issuer) -> AsyncIterator[Issuer]:
    """As in a replica."""
    task = asyncio.create_task(issuer.keys.keep_fresh())
    yield issuer
    task.cancel()


def invented(number: int = 0) -> str:
    return token(kid=f"invented-{number}")


async def test_a_request_does_not_wait_for_an_issuer_that_hangs(issuer: Issuer, provider: Provider) -> None:
    provider.answering.clear()
    skip(400)

    request = asyncio.create_task(issuer.find(token()))
    await until(lambda: provider.asked == 2)

    assert request.done(), "before the issuer was asked for new keys"
    assert await request


@pytest.mark.parametrize("fault", ["hangs", "fails"])
async def test_the_last_keys_are_used_while_the_issuer_is_away_for_up_to_a_day(
    kept_fresh: Issuer, provider: Provider, fault: str
) -> None:
    provider.status = 500
    if fault == "hangs":
        provider.answering.clear()

    for _ in range(20):
        skip(DAY_S / 20 - 100)
        assert await kept_fresh.find(token())
    skip(5000)

    with pytest.raises(IssuerUnavailable):
        await kept_fresh.find(token())


async def test_an_issuer_that_comes_back_is_noticed_without_a_request(kept_fresh: Issuer, provider: Provider) -> None:
    provider.status = 500
    skip(2 * DAY_S)
    await until(lambda: kept_fresh.keys.failures > 0)

    provider.status = 200
    skip(2)
    await until(lambda: kept_fresh.keys.has("rsa"))

    assert await kept_fresh.find(token())


async def test_the_keys_are_fetched_before_they_are_old_though_nobody_asks(
    kept_fresh: Issuer, provider: Provider
) -> None:
    for fetches in (2, 3, 4):
        skip(300)
        await until(lambda fetches=fetches: provider.asked == fetches)  # type: ignore[misc]


async def test_the_first_keys_are_fetched_before_the_first_request(provider: Provider) -> None:
    issuer = Issuer(settings(provider.url))
    task = asyncio.create_task(issuer.keys.keep_fresh())

    await until(lambda: issuer.keys.has("rsa"))

    assert issuer.keys.age_s is not None
    task.cancel()


async def test_all_requests_wait_for_one_fetch(provider: Provider) -> None:
    issuer = Issuer(settings(provider.url))
    provider.answering.clear()

    requests = [asyncio.create_task(issuer.find(token())) for _ in range(100)]
    await until(lambda: provider.asked == 1)
    provider.answering.set()

    assert all(await asyncio.gather(*requests))
    assert (provider.asked, provider.most_open) == (1, 1)


async def test_a_caller_that_leaves_does_not_end_the_fetch_of_the_others(provider: Provider) -> None:
    issuer = Issuer(settings(provider.url))
    provider.answering.clear()
    first, second = (asyncio.create_task(issuer.find(token())) for _ in range(2))
    await until(lambda: provider.asked == 1)

    first.cancel()
    await asyncio.wait({first})
    provider.answering.set()

    assert await second
    assert provider.asked == 1


async def test_without_any_keys_the_answer_is_that_they_are_missing_while_the_issuer_still_hangs(
    provider: Provider,
) -> None:
    issuer = Issuer(settings(provider.url))
    provider.answering.clear()
    request = asyncio.create_task(issuer.find(token()))
    await until(lambda: provider.open == 1)

    skip(1)
    for _ in range(5):
        await asyncio.sleep(0)

    assert request.done(), "after a second"
    assert isinstance(missing := request.exception(), IssuerUnavailable)
    assert missing.retry_after_s == 1
    assert provider.open == 1, "the fetch goes on"
    provider.answering.set()
    await until(lambda: issuer.keys.has("rsa"))
    assert await issuer.find(token())


async def test_invented_keys_cause_one_fetch_in_ten_seconds_and_delay_nobody(
    issuer: Issuer, provider: Provider
) -> None:
    answers = await asyncio.gather(*(issuer.find(invented(number)) for number in range(50)))
    assert (answers, provider.asked) == ([None] * 50, 1)

    skip(10)
    provider.answering.clear()
    requests = [asyncio.create_task(issuer.find(invented(number))) for number in range(50)]
    await until(lambda: provider.asked == 2)
    real = asyncio.create_task(issuer.find(token()))
    await asyncio.sleep(0)
    assert real.done()
    provider.answering.set()

    assert await asyncio.gather(*requests) == [None] * 50
    assert (provider.asked, provider.most_open) == (2, 1)


async def test_a_token_of_a_new_key_is_accepted(issuer: Issuer, provider: Provider) -> None:
    provider.keys = {"rsa-2": OTHER_RSA, "ec": EC}
    assert await issuer.find(token(OTHER_RSA, "rsa-2")) is None, "so soon after the last fetch"

    skip(10)

    assert await issuer.find(token(OTHER_RSA, "rsa-2"))
    assert await issuer.find(token(EC, "ec", "ES256"))
    assert await issuer.find(token()) is None, "its key was withdrawn"


async def test_whether_an_unknown_key_exists_is_not_known_while_the_issuer_is_away(
    issuer: Issuer, provider: Provider
) -> None:
    provider.status = 500
    skip(10)
    with pytest.raises(IssuerUnavailable):
        await issuer.find(token(OTHER_RSA, "rsa-2"))
    asked = provider.asked

    with pytest.raises(IssuerUnavailable) as missing:
        await issuer.find(token(OTHER_RSA, "rsa-2"))

    assert provider.asked == asked
    assert 9 <= (missing.value.retry_after_s or 0) <= 10


@pytest.mark.parametrize("keys", [{}, None], ids=["none", "none-for-signatures"])
async def test_an_answer_without_usable_keys_is_no_answer(
    issuer: Issuer, provider: Provider, keys: dict[str, object] | None
) -> None:
    provider.use = "enc"
    provider.keys = provider.keys if keys is None else keys
    skip(300)

    assert await issuer.find(token())
    await until(lambda: issuer.keys.failures == 1)

    assert await issuer.find(token())


async def test_an_answer_that_never_ends_is_given_up(issuer: Issuer, provider: Provider) -> None:
    provider.trickling = True
    skip(300)
    assert await issuer.find(token())

    for _ in range(200):
        skip(0.2)
        await asyncio.sleep(0.02)
        if issuer.keys.failures:
            break

    assert issuer.keys.failures == 1


async def test_an_outage_is_logged_when_it_begins_and_when_it_ends_and_not_for_each_request(
    kept_fresh: Issuer, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, signing_keys.__name__)
    provider.status = 500
    for failures in range(1, 6):
        skip(300)
        await until(lambda failures=failures: kept_fresh.keys.failures >= failures)  # type: ignore[misc]
        for number in range(10):
            await asyncio.gather(kept_fresh.find(token()), kept_fresh.find(invented(number)), return_exceptions=True)
    provider.status = 200
    skip(10)
    await until(lambda: "again" in caplog.text)

    levels = [record.levelname for record in caplog.records if record.name == signing_keys.__name__]
    assert levels == ["ERROR", "INFO"]


async def test_an_outage_is_told_by_the_metrics_that_an_alert_reads(
    issuer: Issuer, provider: Provider, tmp_path: Path
) -> None:
    engine = EngineSettings(model_path=tmp_path, model_name="m", fingerprint=BASE)
    settings = ServeSettings(engine=engine, gateway=GatewaySettings(admin_tokens={}), state_dir=tmp_path)
    collector = MetricsCollector(settings, MetricsRecorder(10), issuer_keys=issuer.keys)

    def scraped() -> tuple[float, float]:
        text = generate_latest(collector).decode()
        samples = {sample.name: sample.value for f in text_string_to_metric_families(text) for sample in f.samples}
        return samples["graft_issuer_keys_age_seconds"], samples["graft_issuer_failures_total"]

    age_s, failures = scraped()
    assert (age_s < 60, failures) == (True, 0)

    provider.status = 500
    skip(1000)
    assert await issuer.find(token())
    await until(lambda: issuer.keys.failures == 1)

    age_s, failures = scraped()
    assert (1000 <= age_s < 1060, failures) == (True, 1)
