"""Send invalid requests, read damaged files, and count crashes, hangs and leaks.

`python -m benchmarks.hostile` sends thousands of invalid requests to a real server (two engines, callers with keys), as
a caller and as an admin, and bytes that are not HTTP. Then every function that reads files reads thousands of damaged
ones, and directories in which links were planted. No case may cause a server error, hang, end an engine, write outside
its directory, reveal a secret, or be accepted where it must be refused. It takes some minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.faults.testbed import testbed
from benchmarks.hostile.attack import attack_api, attack_files
from benchmarks.hostile.cases import PROBLEMS, CaseResult
from benchmarks.hostile.links import attack_links
from benchmarks.progress import step
from benchmarks.record import Figure, print_figures, write_result

FILES_EACH = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth case; writes no result")
    every = parser.parse_args().every
    step("starting two engines, an object store and a Redis")
    with tempfile.TemporaryDirectory(prefix="graft-hostile-") as directory, testbed(Path(directory)) as running:
        results = asyncio.run(attack_api(running, every))
        results += attack_files(running.artifacts, Path(directory) / "files" / "work", FILES_EACH // every)
        results += attack_links(running.artifacts, Path(directory) / "links")
    for case in results:
        if case.problem:
            print(f"{case.surface}: {case.problem}: {case.detail}")
    if every == 1:
        cases = dict(Counter(case.surface for case in results))
        write_result("hostile", figures(results), "make hostile", {"cases": cases})
    else:
        print_figures(figures(results))


def figures(results: list[CaseResult]) -> dict[str, Figure]:
    counts = Counter(case.problem for case in results)
    return {
        "cases": Figure(len(results), "cases"),
        "surfaces": Figure(len({case.surface for case in results}), "surfaces"),
        **{problem: Figure(counts[problem], "cases", "<= 0") for problem in PROBLEMS},
    }


if __name__ == "__main__":
    main()
