"""Symbolic links where an attacker could plant them: no link may be read, written or emptied through."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.hostile.cases import CaseResult
from benchmarks.progress import step
from convert.artifact.file_names import CHAT_TEMPLATE, GENERATION_CONFIG, OTHER_CHAT_TEMPLATES, TOKENIZER_FILES
from convert.artifact.signature import SIGNATURE, signature_of
from convert.errors import ConvertError
from convert.pipeline.inspect import inspect
from convert.write.journal import JOURNAL
from convert.write.publisher import ArtifactWriter, partial_directory

_SECRET = "root:a secret of this machine"  # noqa: S105  (the text that must not get out)
_COPIED = (*TOKENIZER_FILES, CHAT_TEMPLATE, f"{OTHER_CHAT_TEMPLATES}/tools.jinja", GENERATION_CONFIG)


def attack_links(artifacts: Mapping[str, Path], work: Path) -> list[CaseResult]:
    """Read directories in which one file is a link to a secret, and write where links were planted, in `work`."""
    work.mkdir(parents=True)
    secret = work / "secret"
    secret.write_text(_SECRET)
    checkpoint, base = (artifacts["first"].parent / name for name in ("checkpoint-first", "base"))
    results = [
        *_linked(checkpoint, work, secret, lambda directory: inspect(directory, base)),
        *_linked(base, work, secret, lambda directory: inspect(checkpoint, directory)),
        _signature(work, secret),
        *(_planted(work, where) for where in ("", "model", "adapter", JOURNAL)),
    ]
    step(f"links: {len(results)} cases")
    return results


def _linked(directory: Path, work: Path, secret: Path, read: Callable[[Path], object]) -> Iterator[CaseResult]:
    for name in sorted({*(path.name for path in directory.iterdir() if path.is_file()), *_COPIED}):
        copy = work / f"{directory.name}-{name.replace('/', '-')}"
        shutil.copytree(directory, copy)
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(secret)
        yield _read(f"links of {directory.name}", name, copy, read)
        shutil.rmtree(copy)


def _read(surface: str, name: str, directory: Path, read: Callable[[Path], object]) -> CaseResult:
    try:
        read(directory)
    except ConvertError as error:
        return CaseResult(surface, "leaked", str(error)) if _SECRET in str(error) else CaseResult(surface)
    except Exception as error:
        return CaseResult(surface, "crashed", f"{error!r} for {name}")
    return CaseResult(surface, "accepted", name)


def _signature(work: Path, secret: Path) -> CaseResult:
    directory = work / "signed"
    directory.mkdir()
    (directory / SIGNATURE).symlink_to(secret)
    return CaseResult("links of an artifact", "leaked" if signature_of(directory) else "")


def _planted(work: Path, where: str) -> CaseResult:
    """Write an artifact whose unfinished directory, or a name in it, is a link to a directory with a file."""
    victim, destination = work / f"victim-{where}", work / f"artifact-{where}"
    (victim / "deeper").mkdir(parents=True)
    (victim / "deeper" / "file").write_text("precious")
    planted = partial_directory(destination) / where
    planted.parent.mkdir(exist_ok=True)
    planted.symlink_to(victim)
    before = _content(victim)
    try:
        with ArtifactWriter(destination, "a conversion") as writer:
            (writer.directory("model") / "config.json").write_text("{}")
    except ConvertError:
        pass
    except Exception as error:
        return CaseResult("links of a destination", "crashed", f"{error!r} for {where!r}")
    return CaseResult("links of a destination", "" if _content(victim) == before else "escaped", where)


def _content(directory: Path) -> list[tuple[str, list[str], list[str]]]:
    return [(root, sorted(directories), sorted(files)) for root, directories, files in os.walk(directory)]
