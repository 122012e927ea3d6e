"""The command line: `python -m convert inspect | plan | run | compare | sign | verify`.

Exit status: 0 success; 1 an error in the input, printed as `error[code]: …`; 2 wrong use of the command; 3 the result
misses a limit, and nothing was published; 4 the artifact does not match its manifest.
"""

from __future__ import annotations

import signal


def app(prog_name: str | None = None) -> None:
    """Run the command line. `prog_name`: its name in messages; None for that of the started script.

    Importing the commands takes some tenths of a second, in which Ctrl-C ends the process at once and without a
    traceback. Afterwards the commands clean up first.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from convert.cli.app import app as commands

    signal.signal(signal.SIGINT, handler)
    commands(prog_name=prog_name)


if __name__ == "__main__":
    app("python -m convert")
