"""What can be said of a checkpoint without loading a model: what it is, and the ways to serve it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convert.base_model import BaseModel, public_name
from convert.checkpoint import Checkpoint
from convert.detect import Detection, Training, detect, told
from convert.edits import Edits
from convert.errors import CheckpointUnsupported, ConvertError
from convert.match import require_match
from convert.plan import plan_model
from convert.preparation import scheme_of
from convert.routes.choose import Wish, choose, with_baked
from convert.routes.ways import Way, ways_for


@dataclass(frozen=True)
class Offer:
    """A way with its command; `output_bytes` is None without a base, `obstacle` says why it can't be taken."""

    way: Way
    command: str
    default: bool
    output_bytes: int | None
    obstacle: str | None


@dataclass(frozen=True)
class Inspection:
    checkpoint: Checkpoint
    detection: Detection
    problems: tuple[str, ...]
    offers: tuple[Offer, ...]

    @property
    def base_name(self) -> str:
        return public_name(self.checkpoint.base_name) if self.checkpoint.base_name else "not named"


def inspect(root: Path, base_root: Path | None) -> Inspection:
    """Raises ConvertError where checkpoint or base can't even be read; everything else is in the answer."""
    checkpoint = Checkpoint.open(root)
    found = detect(checkpoint)
    base = BaseModel.open(base_root) if base_root else None
    problems = checkpoint.all_problems + _unsupported_quantizer(root, found)
    offers = tuple(_offer(way, checkpoint, found, base, base_root) for way in ways_for(found.training))
    return Inspection(checkpoint, found, problems, () if problems else offers)


def _unsupported_quantizer(root: Path, found: Detection) -> tuple[str, ...]:
    if found.training is Training.UNKNOWN:
        return ()
    try:
        found.require_known(root)
    except CheckpointUnsupported as error:
        return (str(error),)
    return ()


def _offer(way: Way, checkpoint: Checkpoint, found: Detection, base: BaseModel | None, base_root: Path | None) -> Offer:
    known = found
    trained_on = ""
    if found.training is Training.UNKNOWN:
        known = told(way.training, found)
        trained_on = " --trained-on " + ("4bit" if way.training is Training.QLORA else "full")
    command = f"python -m convert run {checkpoint.root} --base {base_root or 'BASE'} --out DIR{trained_on}"
    default = way.is_exact and way.training is found.training is Training.QLORA
    flags = "" if default else f" {way.flags}"
    obstacle = "; ".join(checkpoint.problems_for(way.route)) or None
    size = None
    if base and not obstacle:
        size, obstacle = _size(way, checkpoint, known, base)
    return Offer(way, command + flags, default, size, obstacle)


def _size(way: Way, checkpoint: Checkpoint, found: Detection, base: BaseModel) -> tuple[int | None, str | None]:
    try:
        choice = choose(way, found, base, Wish(), scheme_of(way.storage, base))
        require_match(checkpoint, base)
        edits = Edits.of(checkpoint, base, separate=way.route == "adapter")
        choice = with_baked(choice, base, edits)
        model = plan_model(base, choice.form, checkpoint, edits).weight_bytes if choice.form else 0
    except ConvertError as error:
        return None, str(error)
    return model + (checkpoint.weight_bytes if way.route == "adapter" else 0), None
