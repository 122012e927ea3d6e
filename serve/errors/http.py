"""Every error the serving side tells a user, each knowing its HTTP answer.

ServeError                    500 server_error
├── UnknownModel              404 model_not_found         no such model or adapter
├── UnknownRoute              404 route_not_found         no such path
├── MethodNotAllowed          405 method_not_allowed      the path takes other methods
├── TaskUnsupported           400 task_unsupported        a public route that this kind of model can't answer
├── InvalidBody               400 invalid_body            not JSON, or `model` is not a string
├── BodyTooLarge              413 body_too_large
├── Unauthorized              401 invalid_admin_token     the admin API without its token
├── InvalidApiKey             401 invalid_api_key         no key, an unknown one, or one that has expired
├── BodyTooSlow               408 body_too_slow           the body did not arrive in time
├── OutputTooLong             400 output_too_long         more tokens asked for than one request may get
├── RateLimited               429 rate_limit_exceeded     a limit of the caller's key
├── PathRefused               403 path_refused            a path outside the allowed directories
├── AdapterRejected           422 adapter_rejected        not for this base, damaged, or more than the engine takes
├── TransitionRefused         409 transition_refused      the catalogue's state does not allow the step
├── PublishFailed             409 publish_failed          a replica could not load or prove it; nothing changed
├── SplitRefused              409 split_refused           a canary or shadow that would change nothing, or isn't there
├── PublishUnconfirmed        504 publish_unconfirmed     the alias moved; a replica did not confirm in time
├── AdaptersExhausted         503 adapters_exhausted      no place to load one more: all are in use by requests
├── AdapterQueueFull          503 adapter_queue_full      too many requests wait for an adapter slot already
├── AdapterWaitTooLong        503 adapter_wait_too_long   no adapter slot came free in time
├── CallerQueueFull           429 caller_queue_full       too many requests of this caller wait already
├── EngineQueueFull           503 engine_queue_full       too many requests wait for the engine already
├── EngineWaitTooLong         503 engine_wait_too_long    no place in the engine came free in time
├── IssuerUnavailable         503 issuer_unavailable      the keys of the identity provider can't be fetched
├── LimitsUnavailable         503 limits_unavailable      whoever counts the requests of all replicas is out of reach
├── AdapterUnavailable        503 adapter_unavailable     it is in the catalogue, but could not be loaded
├── StoreUnavailable          503 store_unavailable       catalogue or adapter store out of reach, or full
├── ReplicaUnreachable        503 replica_unreachable     a replica does not answer the admin API
├── EngineUnavailable         503 engine_unavailable      the engine died and is being replaced
└── StartError                                            before there is a server to answer
    ├── PortInUse             port_in_use
    ├── ArtifactRefused       artifact_refused            invalid, or it doesn't fit the others
    ├── StateInvalid          state_invalid               the state directory is not usable
    ├── DesiredStateInvalid   desired_state_invalid       the file of `apply` says what can't be
    ├── KeysInvalid           keys_invalid                the file of keys can't be used, or not changed like that
    ├── KeysMissing           keys_missing                others could reach the server, and it would know no caller
    ├── TrafficLogInvalid     traffic_log_invalid         `advise` was given a log that it can't read
    ├── ServerNotRunning      server_not_running          `publish` found nobody to talk to
    ├── EngineStartFailed     engine_start_failed
    ├── NodeLost              node_lost                   a process of Ray's own ended under the running server
    └── AdminRefused                                      what the admin API answered, with its code

`code` is stable. Messages say what was wrong, what was expected and what to do.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping

_NAMED_MODELS = 20


class ServeError(Exception):
    """An answer in OpenAI's error shape: {"error": {"message", "type", "param", "code"}}."""

    status = 500
    type = "server_error"
    code = "server_error"
    param: str | None = None
    retry_after_s: int | None = None
    headers: Mapping[str, str] = {}  # of the answer, besides Retry-After

    def body(self) -> dict[str, dict[str, str | None]]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(ServeError):
    status, type = 400, "invalid_request_error"


class UnknownModel(InvalidRequest):
    status, code, param = 404, "model_not_found", "model"

    def __init__(self, model: str, known: Collection[str]) -> None:
        named = ", ".join(heapq.nsmallest(_NAMED_MODELS, known))
        rest = f" and {len(known) - _NAMED_MODELS} more: see GET /v1/models" if len(known) > _NAMED_MODELS else ""
        super().__init__(f"The model `{model}` does not exist. Models here: {named}{rest}.")


class UnknownRoute(InvalidRequest):
    status, code = 404, "route_not_found"

    def __init__(self, method: str, path: str) -> None:
        super().__init__(f"Unknown request URL: {method} {path}. The API is described in docs/api.md.")


class MethodNotAllowed(InvalidRequest):
    status, code = 405, "method_not_allowed"

    def __init__(self, method: str, path: str) -> None:
        super().__init__(f"Not allowed to {method} on {path}.")


class TaskUnsupported(InvalidRequest):
    """A 400 and not a 501: clients repeat what a server can't do, and this won't work the next time."""

    code, param = "task_unsupported", "model"

    def __init__(self, path: str) -> None:
        super().__init__(f"The model that is served here can't answer {path}: it generates text.")


class InvalidBody(InvalidRequest):
    code = "invalid_body"


class PromptLogprobsUnavailable(InvalidRequest):
    code = "prompt_logprobs_unavailable"

    def __init__(self) -> None:
        super().__init__(
            "Log-probabilities of the prompt (`prompt_logprobs`, `echo` with `logprobs`, `echo` of a chat) are not "
            "available from an engine that serves adapters. Those of generated tokens are; a merged model gives both."
        )


class BodyTooLarge(InvalidRequest):
    status, code = 413, "body_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request body is larger than {limit_bytes} bytes; send less at once.")


class Unauthorized(InvalidRequest):
    status, code = 401, "invalid_admin_token"

    def __init__(self) -> None:
        super().__init__("The admin API needs `Authorization: Bearer TOKEN` with the token of this server.")


class InvalidApiKey(InvalidRequest):
    status, code = 401, "invalid_api_key"
    headers = {"www-authenticate": "Bearer"}  # noqa: RUF012  (never changed)

    def __init__(self, given: bool) -> None:
        super().__init__(
            "The API key is not known here, or it has expired."
            if given
            else "No API key was given: send it as `Authorization: Bearer KEY`, or as `x-api-key: KEY`."
        )


class BodyTooSlow(InvalidRequest):
    status, code = 408, "body_too_slow"
    headers = {"connection": "close"}  # noqa: RUF012  (never changed; the rest of the body is not waited for)

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"The request body did not arrive within {limit_s:g} s.")


class OutputTooLong(InvalidRequest):
    code = "output_too_long"

    def __init__(self, field: str, asked: int, limit: int) -> None:
        super().__init__(f"`{field}` is {asked}; one request gets at most {limit} tokens here.")
        self.param = field


class PathRefused(InvalidRequest):
    status, code = 403, "path_refused"


class AdapterRejected(InvalidRequest):
    status, code = 422, "adapter_rejected"


class TransitionRefused(InvalidRequest):
    status, code = 409, "transition_refused"


class PublishFailed(InvalidRequest):
    status, code = 409, "publish_failed"


class SplitRefused(InvalidRequest):
    status, code = 409, "split_refused"


class PublishUnconfirmed(ServeError):
    status, code = 504, "publish_unconfirmed"


class Unavailable(ServeError):
    status, type, retry_after_s = 503, "service_unavailable", 1


class AdaptersExhausted(Unavailable):
    code = "adapters_exhausted"

    def __init__(self, capacity: int) -> None:
        super().__init__(
            f"All {capacity} adapters that this replica can hold are in use by running requests; try again."
        )


class AdapterQueueFull(Unavailable):
    code = "adapter_queue_full"

    def __init__(self, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{limit} requests wait for an adapter slot of this replica already; try again later.")
        self.retry_after_s = retry_after_s


class AdapterWaitTooLong(Unavailable):
    code = "adapter_wait_too_long"

    def __init__(self, waited_s: float, retry_after_s: int) -> None:
        super().__init__(f"No adapter slot of this replica came free within {waited_s:g} s; try again later.")
        self.retry_after_s = retry_after_s


class CallerQueueFull(ServeError):
    status, type, code = 429, "rate_limit_error", "caller_queue_full"

    def __init__(self, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{limit} requests of this caller wait already; send fewer at once, or try again later.")
        self.retry_after_s = retry_after_s


class EngineQueueFull(Unavailable):
    code = "engine_queue_full"

    def __init__(self, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{limit} requests wait for this replica's engine already; try again later.")
        self.retry_after_s = retry_after_s


class EngineWaitTooLong(Unavailable):
    code = "engine_wait_too_long"

    def __init__(self, waited_s: float, retry_after_s: int) -> None:
        super().__init__(f"No place in this replica's engine came free within {waited_s:g} s; try again later.")
        self.retry_after_s = retry_after_s


class IssuerUnavailable(Unavailable):
    code = "issuer_unavailable"

    def __init__(self) -> None:
        super().__init__("The keys of the identity provider can't be fetched at the moment; try again.")


class LimitsUnavailable(Unavailable):
    code = "limits_unavailable"

    def __init__(self) -> None:
        super().__init__("The limits of this key can't be checked at the moment; try again.")


class RateLimited(ServeError):
    """A limit of the caller's key; `kind` says which, as OpenAI tells it in `type`."""

    status, code = 429, "rate_limit_exceeded"

    def __init__(self, message: str, kind: str, retry_after_s: int | None, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.type = kind
        self.retry_after_s = retry_after_s
        self.headers = headers


class AdapterUnavailable(Unavailable):
    code = "adapter_unavailable"


class StoreUnavailable(Unavailable):
    """What is resident is served on; the same call may work a moment later."""

    code, retry_after_s = "store_unavailable", 5


class ReplicaUnreachable(Unavailable):
    code = "replica_unreachable"


class EngineUnavailable(Unavailable):
    code = "engine_unavailable"

    def __init__(self) -> None:
        super().__init__("The engine of this replica stopped and is being replaced; try again.")


class WrongReplica(Unavailable):
    code = "wrong_replica"

    def __init__(self) -> None:
        super().__init__("This request was passed on to a replica that is not here; try again.")


class StartError(ServeError):
    """A mistake found before there is a server: the command line prints it and exits with 1."""


class PortInUse(StartError):
    code = "port_in_use"


class ArtifactRefused(StartError):
    code = "artifact_refused"


class StateInvalid(StartError):
    code = "state_invalid"


class DesiredStateInvalid(StartError):
    code = "desired_state_invalid"


class KeysInvalid(StartError):
    code = "keys_invalid"


class KeysMissing(StartError):
    code = "keys_missing"

    def __init__(self, host: str) -> None:
        super().__init__(
            f"Others may reach {host}, and there are no keys: anyone could use every model. Make one with "
            "`python -m serve key create ID`, or say --open if that is what you want."
        )


class TrafficLogInvalid(StartError):
    code = "traffic_log_invalid"


class ServerNotRunning(StartError):
    code = "server_not_running"


class EngineStartFailed(StartError):
    code = "engine_start_failed"


class NodeLost(StartError):
    code = "node_lost"


class AdminRefused(StartError):
    """What the admin API of a running server answered, told to its caller under the code it gave."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
