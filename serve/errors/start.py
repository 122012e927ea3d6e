"""Errors that end a command before there is a server to answer, or that the admin API answered with."""

from __future__ import annotations

from serve.errors.http import ServeError


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


class EngineRefused(EngineStartFailed):
    """vLLM refuses the model or its arguments: another attempt would end the same."""


class MemoryShort(StartError):
    code = "memory_short"


class NodeLost(StartError):
    code = "node_lost"


class ProxyScriptUnusable(StartError):
    code = "proxy_script_unusable"


class AdminRefused(StartError):
    """An error that the admin API of a running server answered with, under the code of that answer."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
