"""Ways of one checkpoint made, measured and set side by side; nothing of them is kept but the page."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from convert.artifact import ADAPTER_DIR, MODEL_DIR
from convert.comparison import Comparison, Row, comparison_document, comparison_page
from convert.conversion import AUTO_GATE, base_of, origin_of, versions
from convert.detect import Training
from convert.errors import ConvertError, OutputUnwritable, RouteRefused
from convert.plan import require_room
from convert.preparation import Candidate, Job, Request, prepare
from convert.progress import Progress
from convert.routes.ways import WAYS, Way, ways_for
from convert.trial import Bench, Outcome
from convert.verification.engine import EngineOptions
from convert.verification.speed import measure_speed
from convert.writer import require_absent, write_json

PAGE, DOCUMENT = "comparison.html", "comparison.json"
_SPEED_TOKENS = 32


@dataclass(frozen=True)
class Surveyed:
    """What was compared, and which ways could not be taken, with the reason."""

    comparison: Comparison
    obstacles: tuple[str, ...]


def survey(request: Request, names: Sequence[str] | None, *, speed: bool, progress: Progress) -> Surveyed:
    """Make and measure every way that this checkpoint, base and target can carry.

    `names`: as `way_named` reads them; None for all that are offered. Raises ConvertError for the input, and where no
    way can be taken.
    """
    job = prepare(request, progress)
    training = job.found.training
    ways = [way_named(name, training) for name in names] if names else ways_for(training)
    gate = request.gate if request.gate.is_set else AUTO_GATE
    bench = Bench(job, gate, progress)
    rows, obstacles = [], []
    last: ConvertError | None = None
    for way in ways:
        try:
            rows.append(_row(job, job.candidate(way), bench, speed=speed, progress=progress))
        except ConvertError as error:
            obstacles.append(f"{way.flags}: {error}")
            last = error
    if not rows:
        assert last, "there is at least one way of each training"
        raise last
    comparison = Comparison(
        name=job.checkpoint.root.name,
        origin=origin_of(job),
        base=base_of(job.checkpoint, job.base, {}),
        rows=_chosen(rows),
        answers=bench.answers,
        versions=versions(),
    )
    return Surveyed(comparison, tuple(obstacles))


def way_named(name: str, training: Training) -> Way:
    """The way `ROUTE:STORED` or `ROUTE:STORED:WEIGHTS`, as merge:nf4:original. Raises RouteRefused."""
    known = {_name(way): way for way in WAYS if way.training is training}
    default = {name.removesuffix(f":{_trained_on(training)}"): way for name, way in known.items()}
    if way := known.get(name) or default.get(name):
        return way
    raise RouteRefused(f"There is no way {name!r} of a {training.value}. There are: {', '.join(sorted(default))}.")


def _name(way: Way) -> str:
    return f"{way.route}:{way.storage}" + (f":{way.onto}" if way.onto else "")


def _trained_on(training: Training) -> str:
    return "dequantized" if training is Training.QLORA else "original"


def write_report(surveyed: Surveyed, directory: Path) -> None:
    """Write the page and the document into a new directory. Raises OutputExists, OutputUnwritable."""
    require_absent(directory)
    try:
        directory.mkdir(parents=True)
        (directory / PAGE).write_text(comparison_page(surveyed.comparison), encoding="utf-8")
        document = comparison_document(surveyed.comparison) | {"obstacles": list(surveyed.obstacles)}
        write_json(directory / DOCUMENT, document)
    except OSError as error:
        raise OutputUnwritable(f"{directory} can't be written: {error.strerror}.") from error


def _row(job: Job, candidate: Candidate, bench: Bench, *, speed: bool, progress: Progress) -> Row:
    with tempfile.TemporaryDirectory(prefix="graft-compare-") as scratch:
        root = Path(scratch)
        require_room(candidate.plan.weight_bytes if candidate.plan else 0, root / "way")
        outcome = bench.run(candidate, root)
        tokens_per_s = _speed(job, root, progress) if speed else None
        shutil.rmtree(root / MODEL_DIR, ignore_errors=True)
    return _told(job, outcome, tokens_per_s)


def _told(job: Job, outcome: Outcome, tokens_per_s: float | None) -> Row:
    way = outcome.candidate.way
    assert outcome.quality, "what is compared is measured"
    assert outcome.examination, "what is compared is measured"
    onto = " onto the original weights" if way.onto == "original" and job.quantizer else ""
    return Row(
        label=f"{way.route}{onto}, {way.stored}",
        command=f"{job.request.command()} {way.flags}",
        route=way.route,
        quantization=outcome.quantization,
        size_bytes=outcome.size_bytes,
        quality=outcome.quality,
        failures=outcome.failures,
        decode_tokens_per_s=tokens_per_s,
        recovery=outcome.made.recovery,
        retained=outcome.retained,
        answers=outcome.examination.answers,
    )


def _chosen(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The smallest that passes, marked; of equal size the one that loses less."""
    passing = [row for row in rows if row.passes]
    best = min(passing, key=lambda row: (row.size_bytes, row.quality.kl_mean), default=None)
    return tuple(replace(row, chosen=row is best) for row in rows)


def _speed(job: Job, root: Path, progress: Progress) -> float:
    adapter = root / ADAPTER_DIR
    model = root / MODEL_DIR
    found = measure_speed(
        model if model.is_dir() else job.base.root,
        adapter if adapter.is_dir() else None,
        rank=job.rank if adapter.is_dir() else 0,
        streams=(1,),
        tokens=_SPEED_TOKENS,
        options=EngineOptions(),
        progress=progress,
    )
    return found[0].tokens_per_s
