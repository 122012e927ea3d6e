"""The admin API: changes of the catalogue, its content and history, and reports of the replicas. Every call needs a
bearer token."""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from convert.artifact import Name, problems_of
from serve.adapters.admission import Admission
from serve.adapters.ingest import ingest_path
from serve.adapters.publish import Control
from serve.adapters.rollout import begin_split, end_split
from serve.admin.views import adapter_view, adapters_view, history_view
from serve.callers.identity import key_of
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.candidate import Candidate
from serve.catalogue.entry import CALLER_HEADER, Audit
from serve.catalogue.split import KINDS, Kind, SplitPolicy
from serve.catalogue.storage.file_threads import to_file_thread
from serve.errors import AdapterRejected, ArtifactRefused, InvalidBody, Unauthorized, UnknownModel
from serve.names import AdapterRevision
from serve.settings import AdmissionSettings, EngineSettings
from serve.settings.admin_tokens import sha256

_NOT_ALLOWED_IN_CALLER = re.compile(r"[^\w.@+-]")
_MAX_CALLER_CHARACTERS = 64
_MAX_REASON_CHARACTERS = 500
_MAX_HISTORY = 1000


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PublishBody(_Body):
    """Either a candidate whose files are in the store already, or a path on the server's machine."""

    candidate: Candidate | None = None
    path: Path | None = None
    name: Name | None = Field(default=None, description="With `path`: publish under this name.")
    base: Name | None = Field(
        default=None, description="With the `path` of a plain PEFT adapter: its base model, if the server has several."
    )
    stage_only: bool = False
    reason: str = Field(default="", max_length=_MAX_REASON_CHARACTERS)


class RevisionBody(_Body):
    """A revision of the adapter in the URL."""

    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{12,64}$", description="Its digest or how it begins.")
    reason: str = Field(default="", max_length=_MAX_REASON_CHARACTERS)


class SplitBody(SplitPolicy):
    """The revision that gets a share of the traffic, and the policy of the split."""

    revision: str = Field(pattern=r"^[0-9a-f]{12,64}$", description="Its digest or how it begins.")
    reason: str = Field(default="", max_length=_MAX_REASON_CHARACTERS)

    @property
    def policy(self) -> SplitPolicy:
        return SplitPolicy(**self.model_dump(exclude={"revision", "reason"}))


_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class Admin:
    """The endpoints. The replica that gets a call coordinates the change on all replicas."""

    tokens: Mapping[str, str]  # label → SHA-256
    settings: AdmissionSettings
    admission: Admission
    store: AdapterStore
    control: Control

    def routes(self) -> list[Route]:
        adapters, adapter = "/admin/v1/adapters", "/admin/v1/adapters/{name}"
        return [
            Route(adapters, self.list_adapters, methods=["GET"]),
            Route(adapters, self.publish, methods=["POST"]),
            Route(adapter, self.show, methods=["GET"]),
            Route(adapter, self.retire, methods=["DELETE"]),
            Route(f"{adapter}/history", self.history, methods=["GET"]),
            Route("/admin/v1/history", self.history, methods=["GET"]),
            *(Route(f"{adapter}/{verb}", self.change, methods=["POST"]) for verb in _REVISION_CHANGES),
            *(Route(f"{adapter}/{kind}", self.begin_split, methods=["POST"]) for kind in KINDS),
            *(Route(f"{adapter}/{kind}", self.end_split, methods=["DELETE"]) for kind in KINDS),
            Route("/admin/v1/replicas", self.list_replicas, methods=["GET"]),
        ]

    async def publish(self, request: Request) -> Response:
        """Checks an adapter, has every replica load and verify it, and moves the alias unless it is only staged."""
        caller = self.caller(request)
        body = parse_body(PublishBody, await request.body() or b"{}")
        candidate = await self.admit(body)
        change = self.control.stage if body.stage_only else self.control.publish
        return JSONResponse((await change(candidate, Audit(caller, body.reason))).model_dump())

    async def admit(self, body: PublishBody) -> Candidate:
        """The candidate, after its files were put into the store and checked. Raises InvalidBody, PathRefused or
        AdapterRejected."""
        if body.candidate is not None and body.path is None:
            candidate = body.candidate
        elif body.path is not None and body.candidate is None:
            candidate = await self._ingest(body.path, body.name, body.base)
        else:
            raise InvalidBody("The body must hold either `candidate` or `path`.")
        await to_file_thread("admin", self._check_files, candidate)
        return candidate

    def _check_files(self, candidate: Candidate) -> None:
        with self.store.held(candidate.adapter) as files:
            self.admission.check(candidate, files)

    async def _ingest(self, path: Path, name: str | None, base: str | None) -> Candidate:
        def engine() -> EngineSettings:
            return self.admission.engine_for(base)

        try:
            return await to_file_thread("admin", ingest_path, path, name, self.store, engine, self.settings)
        except ArtifactRefused as error:
            raise AdapterRejected(str(error)) from error

    async def change(self, request: Request) -> Response:
        """Promotes, rolls back to, pins, unpins or abandons a revision."""
        caller = self.caller(request)
        body = parse_body(RevisionBody, await request.body() or b"{}")
        name, verb = request.path_params["name"], request.url.path.rpartition("/")[2]
        return await _REVISION_CHANGES[verb](self.control, name, body.revision, Audit(caller, body.reason))

    async def retire(self, request: Request) -> Response:
        name, reason = request.path_params["name"], request.query_params.get("reason", "")[:_MAX_REASON_CHARACTERS]
        reports = await self.control.retire(name, Audit(self.caller(request), reason))
        return JSONResponse({"model": name, "replicas": len(reports)})

    async def begin_split(self, request: Request) -> Response:
        """Begins a canary or shadow: a known revision gets a share of the traffic of its name."""
        caller = self.caller(request)
        name, kind = request.path_params["name"], _split_kind(request)
        body = parse_body(SplitBody, await request.body() or b"{}")
        reports = await begin_split(self.control, name, body.revision, kind, body.policy, Audit(caller, body.reason))
        return JSONResponse({"model": name, kind: body.revision, "share": body.share, "replicas": len(reports)})

    async def end_split(self, request: Request) -> Response:
        caller = self.caller(request)
        name, kind = request.path_params["name"], _split_kind(request)
        reason = request.query_params.get("reason", f"The {kind} was ended.")[:_MAX_REASON_CHARACTERS]
        reports = await end_split(self.control, name, kind, Audit(caller, reason))
        return JSONResponse({"model": name, "ended": kind, "replicas": len(reports)})

    async def give_up(self, canary: AdapterRevision, reason: str) -> None:
        """Ends a canary that is worse than the stable revision. Raises what `end_split` raises."""
        await end_split(self.control, canary.name, "canary", Audit("graft", reason), canary.revision)

    async def list_adapters(self, request: Request) -> Response:
        self.caller(request)
        catalogue = await asyncio.to_thread(self.control.log.read)
        return JSONResponse({"epoch": catalogue.epoch, "adapters": adapters_view(catalogue)})

    async def show(self, request: Request) -> Response:
        self.caller(request)
        name = request.path_params["name"]
        catalogue = await asyncio.to_thread(self.control.log.read)
        if name not in catalogue.adapters:
            raise UnknownModel(name, catalogue.adapters)
        return JSONResponse(adapter_view(name, catalogue.adapters[name]))

    async def history(self, request: Request) -> Response:
        """The changes of one adapter or of all: by whom, when and why. The latest one first."""
        self.caller(request)
        limit = request.query_params.get("limit", "100")
        if not limit.isascii() or not limit.isdigit() or int(limit) > _MAX_HISTORY:
            raise InvalidBody(f"`limit` must be a number up to {_MAX_HISTORY}.")
        name = request.path_params.get("name")
        entries = await asyncio.to_thread(self.control.log.history, name, int(limit))
        return JSONResponse({"history": history_view(entries)})

    async def list_replicas(self, request: Request) -> Response:
        """Has every replica follow the catalogue and lists their reports."""
        self.caller(request)
        reports = await self.control.replicas.sync()
        return JSONResponse({"replicas": [report.model_dump() for report in reports]})

    def caller(self, request: Request) -> str:
        """The name of the caller for the history: the label of the token or the id of the admin key, followed
        by the value of CALLER_HEADER if the caller sends that header. Raises Unauthorized."""
        label = self._label_of(request)
        if label is None:
            raise Unauthorized
        stated = _NOT_ALLOWED_IN_CALLER.sub("", request.headers.get(CALLER_HEADER, ""))[:_MAX_CALLER_CHARACTERS]
        return f"{label}/{stated}" if stated else label

    def _label_of(self, request: Request) -> str | None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        digest = sha256(token)
        # All tokens are compared, so that the time does not depend on which one matches.
        labels = [label for label, known in self.tokens.items() if hmac.compare_digest(digest, known)]
        if labels and token and scheme.lower() == "bearer":
            return labels[0]
        key = key_of(request.scope)
        return key.id if key is not None and key.admin else None


async def _promote(control: Control, name: str, revision: str | None, audit: Audit) -> Response:
    return JSONResponse((await control.promote(name, _required(revision), audit)).model_dump())


async def _roll_back(control: Control, name: str, revision: str | None, audit: Audit) -> Response:
    return JSONResponse((await control.roll_back(name, revision, audit)).model_dump())


async def _abandon(control: Control, name: str, revision: str | None, audit: Audit) -> Response:
    reports = await control.abandon(name, _required(revision), audit)
    return JSONResponse({"model": name, "replicas": len(reports)})


async def _pin(control: Control, name: str, revision: str | None, audit: Audit) -> Response:
    return JSONResponse({"model": name, "revision": str(await control.pin(name, revision, audit)), "pinned": True})


async def _unpin(control: Control, name: str, revision: str | None, audit: Audit) -> Response:
    return JSONResponse({"model": name, "revision": str(await control.unpin(name, revision, audit)), "pinned": False})


_REVISION_CHANGES = {"promote": _promote, "rollback": _roll_back, "abandon": _abandon, "pin": _pin, "unpin": _unpin}


def _split_kind(request: Request) -> Kind:
    last = request.url.path.rpartition("/")[2]
    return next(kind for kind in KINDS if kind == last)


def _required(revision: str | None) -> str:
    if revision is None:
        raise InvalidBody("`revision` must say which revision: 12 or more digits of its digest.")
    return revision


def parse_body(kind: type[_Model], content: bytes) -> _Model:
    """The content as an instance of the model `kind`. Raises InvalidBody."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise InvalidBody(f"The body does not fit: {problems_of(error)}.") from error
