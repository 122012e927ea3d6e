"""Break one thing after another under load, and count what callers saw.

`python -m benchmarks.faults` runs two engines with an object store, a Redis, callers with keys and a Prometheus on
this machine, asks without a pause for every adapter, publishes again and again, and meanwhile kills, stops, cuts,
fills and corrupts. Every answer is compared with what its revision says. A quarter of an hour.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from benchmarks.faults.run import Row, run
from benchmarks.faults.suite import Fault, faults, impossible_here
from benchmarks.faults.world import world
from benchmarks.record import RESULTS, Figure, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="WORDS", help="faults with these words; writes no result")
    parser.add_argument("--list", action="store_true", help="the names of the faults that can be had here")
    options = parser.parse_args()
    chosen = [it for it in faults() if not options.only or any(words in it.name for words in options.only)]
    if options.list:
        print("\n".join(it.name for it in chosen))
        return
    rows = measure(chosen)
    if not options.only:
        details = {"faults": [row.as_data() for row in rows], "not_here": impossible_here()}
        write_result("chaos", figures(rows), "make chaos", details)
        from benchmarks.faults.picture import draw

        draw(rows, RESULTS / "chaos.png")


def measure(chosen: list[Fault]) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="graft-faults-") as directory:
        print("starting two engines, an object store, a Redis …", flush=True)
        with world(Path(directory)) as running:
            return asyncio.run(run(running, chosen, tell=lambda line: print(line, flush=True)))


def figures(rows: list[Row]) -> dict[str, Figure]:
    def total(*outcomes: str) -> int:
        return sum(row.outcomes.get(it, 0) for row in rows for it in outcomes)

    return {
        "faults": Figure(len(rows), "faults"),
        "requests": Figure(total("answered", "refused", "broken", "unclear", "wrong", "hung"), "requests"),
        "failed_requests": Figure(total("refused", "broken", "unclear", "hung"), "requests"),
        "refused_clearly": Figure(total("refused"), "requests"),
        "broken_off": Figure(total("broken"), "requests"),
        "unclear_errors": Figure(total("unclear"), "requests", "<= 0"),
        "wrong_answers": Figure(total("wrong"), "answers", "<= 0"),
        "hung_requests": Figure(total("hung"), "requests", "<= 0"),
        "publishes_acknowledged": Figure(sum(row.acknowledged for row in rows), "publishes"),
        "acknowledged_lost": Figure(sum(row.acknowledged_lost for row in rows), "publishes", "<= 0"),
        "left_processes": Figure(rows[-1].left_processes if rows else 0, "processes", "<= 0"),
        "worst_recovery_s": Figure(max((row.recovery_s for row in rows), default=0), "s"),
    }


if __name__ == "__main__":
    main()
