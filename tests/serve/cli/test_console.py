"""What a person sees on a terminal of 80 columns, and in a log where there is none."""

from __future__ import annotations

import inspect
import io
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from serve.cli import console, foreground, options
from serve.cli.app import app
from serve.cli.command import expand_options
from serve.cli.run import RunOptions, run
from serve.settings import EngineSettings, GatewaySettings, ServeSettings


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed to standard error, which is no terminal here, at 80 columns."""
    written = io.StringIO()
    err = Console(file=written, width=80)
    for module in (console, foreground):
        monkeypatch.setattr(module, "err", err)
    return written


class FakeAdmin:
    """The admin API of a server with one adapter, whose name is of a usual length, and one replica."""

    url = "http://a-rather-long-host-name-of-a-company.example:8000/behind/a/proxy/with/a/path/of/its/own"

    @classmethod
    def of(cls, *_: object) -> FakeAdmin:
        return cls()

    def adapters(self) -> list[dict[str, object]]:
        revisions = {"current": REVISION, "previous": REVISION, "staged": [REVISION, REVISION], "pinned": [REVISION]}
        return [{"name": "support-german", **revisions}]

    def history(self, *_: object) -> list[dict[str, object]]:
        return [{"epoch": 12345, "at": AT, "by": "admin/root", "verb": "rollback", "revision": REVISION, "reason": WHY}]

    def show(self, *_: object) -> dict[str, object]:
        row = {"revision": REVISION, "state": "serving", "pinned": True, "at": AT, "by": "admin/root", "reason": WHY}
        return {"revisions": [row]}

    def call(self, *_: object) -> dict[str, object]:
        tokens = {"requests": 12345, "prompt_tokens": 123456789, "completion_tokens": 123456789}
        return {"usage": [{"day": "2026-11-29", "key": "support-team", "model": "support-german", **tokens}]}

    def replicas(self) -> list[dict[str, object]]:
        counts = {"epoch": 12345, "running_requests": 100}
        faults = {"failures": {REVISION: WHY}, "repairs": [WHY]}
        return [{"replica": "0123abcd", **counts, "resident": [REVISION], **faults}]

    def retire(self, *_: object) -> dict[str, object]:
        return {"model": "support-german", "replicas": 1}


AT, SHOWN_AT = "2026-11-29T06:12:58.123456+00:00", "2026-11-29 06:12:58"
REVISION = "support-german@0123456789ab"
WHY = "because it answers better than the one before"


@pytest.fixture
def run_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Runs a command on a terminal of 80 columns, against a FakeAdmin."""
    monkeypatch.setattr(options, "AdminClient", FakeAdmin)
    monkeypatch.setattr(console, "err", Console(stderr=True, width=80))
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *arguments: CliRunner().invoke(app, [*arguments, "--state", str(tmp_path)])


@pytest.mark.parametrize(
    ("command", "whole"),
    [
        (["list"], ["support-german", "0123456789ab"]),
        (["history"], [SHOWN_AT, "admin/root", "rollback", REVISION]),
        (["show", "support-german"], [SHOWN_AT, "serving", REVISION]),
        (["usage"], ["2026-11-29", "support-team", "support-german", "123456789"]),
        (["status"], [FakeAdmin.url, "0123abcd", REVISION]),
    ],
)
def test_tables_keep_names_and_times_whole_on_80_columns(
    run_serve: Callable[..., Result], command: list[str], whole: list[str]
) -> None:
    result = run_serve(*command)

    assert result.exit_code == 0, result.output
    assert all(text in result.stdout for text in whole), result.stdout
    assert "…" not in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if line != FakeAdmin.url) <= 80


def test_what_a_replica_failed_to_do_is_a_line_of_its_own(run_serve: Callable[..., Result]) -> None:
    assert f"0123abcd could not load {REVISION}: {WHY}" in run_serve("status").stderr.splitlines()


def test_keys_and_their_limits_are_readable_on_80_columns(run_serve: Callable[..., Result]) -> None:
    limits = ("--requests-per-minute", "100", "--tokens-per-minute", "100000", "--concurrent-requests", "4")
    run_serve("key", "create", "support-team", "--model", "support-*", "--expires-in-days", "9", *limits)

    lines = run_serve("key", "list").stdout.splitlines()

    assert [line.rstrip().split("  ")[-1].strip() for line in lines[1:]] == [
        "100 requests/min",
        "100,000 tokens/min",
        "4 at a time",
    ]
    assert max(map(len, lines)) <= 80


def test_one_replica_is_not_called_replicas(run_serve: Callable[..., Result]) -> None:
    assert run_serve("retire", "support-german").stderr == "support-german is retired on 1 replica.\n"


def test_names_that_are_too_long_for_80_columns_are_broken_and_not_cut_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    row = {
        "epoch": 123,
        "at": AT,
        "by, reason": "somebody.with.a.long.name@example.com",
        "verb": "promote",
        "revision": f"{'a-very-long-adapter-name' * 2}@0123456789ab",
    }

    console.print_rows([row], tuple(row), False, {})

    head, *lines = capsys.readouterr().out.splitlines()
    assert SHOWN_AT in lines[0]
    assert max(map(len, lines)) <= 80
    for column, end in (("by, reason", head.index("verb")), ("revision", None)):
        assert "".join(line[head.index(column) : end].strip() for line in lines) == row[column]


def test_a_line_to_copy_is_never_wrapped(screen: io.StringIO) -> None:
    line = "cp '/a path with [brackets] and spaces/" + "x" * 100 + "' elsewhere"

    console.print_line(line)

    assert screen.getvalue() == line + "\n"


def test_the_suggested_request_is_one_command_of_a_shell(tmp_path: Path) -> None:
    settings = ServeSettings(
        engine=EngineSettings(model_path=tmp_path, model_name="it-s-a-model", fingerprint="0" * 64),
        gateway=GatewaySettings(admin_tokens={}, keys_file=tmp_path / "keys.json"),
        state_dir=tmp_path,
    )

    words = shlex.split(foreground._example_request(settings, "http://127.0.0.1:8000"))

    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert "authorization: Bearer KEY" in words
    assert '"model": "it-s-a-model"' in words[-1]


def test_steps_are_a_line_each_where_there_is_no_terminal(screen: io.StringIO) -> None:
    steps = console.StepProgress()

    for text in ("Ray starts", "0 of 2 engines are ready", "0 of 2 engines are ready", "2 of 2 engines are ready"):
        steps.step(text)
    steps.close()

    lines = screen.getvalue().splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        "Ray starts",
        "0 of 2 engines are ready",
        "2 of 2 engines are ready",
    ]
    assert all(line.startswith("[") and " s]" in line for line in lines)


def test_an_option_takes_default_and_bounds_from_its_setting() -> None:
    signature = inspect.signature(run)

    assert set(signature.parameters) == set(RunOptions.model_fields)
    option = signature.parameters["max_resident_adapters"]
    assert option.default == EngineSettings.model_fields["max_resident_adapters"].default
    (info,) = option.annotation.__metadata__
    assert (info.min, info.max) == (1, None)
    assert info.help == EngineSettings.model_fields["max_resident_adapters"].description


def test_a_command_gets_its_options_as_one_object(tmp_path: Path) -> None:
    received: list[tuple[RunOptions, str]] = []

    def command(options: RunOptions, name: str) -> None:
        received.append((options, name))

    expand_options(command)(artifacts=[tmp_path], port=9000, name="a")

    given, name = received[0]
    assert (given.artifacts, given.port, given.replicas, name) == ([tmp_path], 9000, 1, "a")
