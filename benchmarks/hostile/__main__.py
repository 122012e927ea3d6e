"""Send, store and configure what nobody should, and count what comes of it.

`python -m benchmarks.hostile` asks a real server (two engines, callers with keys) thousands of things that are wrong,
over HTTP and below it, as a caller and as an admin; then has every reader of files read thousands of damaged ones.
Nothing may be a server error, hang, bring down an engine, leave its directory or tell a secret. Some minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.faults.world import world
from benchmarks.hostile.attack import Found, attack_api, attack_files
from benchmarks.record import Figure, write_result

FILES_EACH = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth case; writes no result")
    every = parser.parse_args().every
    with tempfile.TemporaryDirectory(prefix="graft-hostile-") as directory, world(Path(directory)) as running:
        found = asyncio.run(attack_api(running, every))
        found += attack_files(running.artifacts, Path(directory) / "files" / "work", FILES_EACH // every)
    for case in found:
        if case.what:
            print(f"{case.surface}: {case.what}: {case.told}")
    if every == 1:
        cases = dict(Counter(it.surface for it in found))
        write_result("hostile", figures(found), "make hostile", {"cases": cases})
    else:
        for name, figure in figures(found).items():
            print(f"{name:40} {figure.value:.4g} {figure.unit}")


def figures(found: list[Found]) -> dict[str, Figure]:
    counts = Counter(it.what for it in found)
    return {
        "cases": Figure(len(found), "cases"),
        "surfaces": Figure(len({it.surface for it in found}), "surfaces"),
        **{it: Figure(counts[it], "cases", "<= 0") for it in ("crashed", "hung", "escaped", "leaked", "killed")},
    }


if __name__ == "__main__":
    main()
