"""`python -m serve`: serve artifacts on this machine, and change and show what a running server serves."""

from __future__ import annotations

import signal


def app(prog_name: str | None = None) -> None:
    """Run the command line. `prog_name`: its name in messages; None for that of the started script.

    Importing the commands takes some tenths of a second, or seconds where nothing of them is in the page cache. Ctrl-C
    then ends the process at once and without a traceback. Afterwards the commands clean up first.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from serve.cli.app import app as commands

    signal.signal(signal.SIGINT, handler)
    commands(prog_name=prog_name)


if __name__ == "__main__":
    app("python -m serve")
