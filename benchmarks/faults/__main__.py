"""Inject one fault after another under load, and count what callers observe.

`python -m benchmarks.faults` runs two engines with an object store, a Redis, callers with keys and a Prometheus on
this machine. Callers request every adapter without a pause and adapters are published repeatedly. Meanwhile processes
are killed or stopped, connections cut, a disk filled and files corrupted. Every answer is compared with the expected
text of its revision. It takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.faults.run import FaultResult, run
from benchmarks.faults.suite import Fault, faults, unavailable_faults
from benchmarks.faults.testbed import testbed
from benchmarks.progress import step
from benchmarks.record import RESULTS, Figure, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="WORDS", help="only faults whose names have these words")
    parser.add_argument("--list", action="store_true", help="list the names of the faults that this machine can run")
    options = parser.parse_args()
    chosen = [fault for fault in faults() if not options.only or any(words in fault.name for words in options.only)]
    if options.list:
        print("\n".join(fault.name for fault in chosen))
        return
    rows = measure(chosen)
    if not options.only:
        details = {"faults": [asdict(row) for row in rows], "not_here": unavailable_faults()}
        write_result("chaos", figures(rows), "make chaos", details)
        from benchmarks.faults.picture import draw

        draw(rows, RESULTS / "chaos.png")


def measure(chosen: list[Fault]) -> list[FaultResult]:
    with tempfile.TemporaryDirectory(prefix="graft-faults-") as directory:
        step("starting two engines, an object store and a Redis")
        with testbed(Path(directory)) as running:
            return asyncio.run(run(running, chosen, report=step))


def figures(rows: list[FaultResult]) -> dict[str, Figure]:
    def total(*outcomes: str) -> int:
        return sum(row.outcomes.get(outcome, 0) for row in rows for outcome in outcomes)

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
