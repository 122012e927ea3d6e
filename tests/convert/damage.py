"""Damaged copies of the files that a conversion reads: every key of a file with every kind of wrong value, and every
kind of damage to a file as a whole.

`python -m tests.convert.damage` reads all of them with every command (minutes), and prints what ended in anything but
a ConvertError or success, or left files behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import ConvertError

Location = tuple[str | int, ...]

# JSON texts, since Python can't write all of them.
VALUES: Mapping[str, str] = {
    "null": "null",
    "true": "true",
    "a negative number": "-1",
    "zero": "0",
    "a fraction": "0.5",
    "a huge number": "1" + "0" * 30,
    "a number that no float holds": "1" + "0" * 400,
    "NaN": "NaN",
    "Infinity": "Infinity",
    "a text": '"x"',
    "an empty text": '""',
    "a text with a null character": '"a\\u0000b"',
    "half of a pair": '"\\ud800"',
    "a broken pattern": '"("',
    "a very long text": f'"{"x" * 100_000}"',
    "an empty list": "[]",
    "an empty object": "{}",
    "a nested list": "[[1]]",
    "a list of mixed types": '[null, "x", -1, {}]',
    "an object": '{"(": null, "x": [1]}',
    "deep": "[" * 200 + "]" * 200,
    "very deep": "[" * 100_000 + "]" * 100_000,
}
_REMOVED = "removed"
# Of a vocabulary or a list only the first entries are damaged: the others are of the same kind.
_ENTRIES = 2
_LARGE = 40
HUNG_AFTER_S = 120


class Hung(BaseException):
    """No Exception, and no OSError: a command must not take it for an error of its own."""


@dataclass(frozen=True)
class Damage:
    """`file`: the path in the directory. `key`: what was damaged, None for the whole file."""

    file: str
    kind: str
    key: Location | None
    apply: Callable[[Path], None]

    def __str__(self) -> str:
        return f"{self.file}: {'.'.join(map(str, self.key)) if self.key else 'the file'}: {self.kind}"


def of_keys(directory: Path, file: str, added: Mapping[str, Any] | None = None) -> Iterator[Damage]:
    """Every key of a JSON file with every wrong value. `added`: keys that the file may have, besides its own."""
    document = dict(added or {}) | json.loads((directory / file).read_text())
    for location in locations(document):
        for kind, text in VALUES.items():
            yield Damage(file, kind, location, writing(file, with_value(document, location, text).encode()))
        yield Damage(file, _REMOVED, location, writing(file, json.dumps(without(document, location)).encode()))


def of_file(directory: Path, file: str) -> Iterator[Damage]:
    """Every damage to the file as a whole."""
    content = (directory / file).read_bytes()
    kinds = {
        "empty": b"",
        "half of it": content[: len(content) // 2],
        "with a byte order mark": b"\xef\xbb\xbf" + content,
        "not UTF-8": b"\xff\xfe" + content,
        "UTF-16": content.decode(errors="replace").encode("utf-16"),
        "null characters": bytes(len(content)),
        "every key twice": content.replace(b"{", b'{"eos_token_id": {}, "r": [], "vocab": 7,', 1),
        **{f"holds {kind}": VALUES[kind].encode() for kind in ("null", "a text", "a nested list", "deep", "very deep")},
    }
    for kind, damaged in kinds.items():
        yield Damage(file, kind, None, writing(file, damaged))
    for kind, place in _PLACES.items():
        yield Damage(file, kind, None, _placing(file, place))


def outcome_and_message(work: Callable[[], object]) -> tuple[str, str]:
    """`ok` or the code of the ConvertError; the name of any other error, and `hung` where it took too long."""

    def interrupt(*_: object) -> None:
        raise Hung(f"no answer after {HUNG_AFTER_S} s")

    signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(HUNG_AFTER_S)
    try:
        work()
    except ConvertError as error:
        return error.code, str(error)
    except OSError as error:  # the command line reports it as file_inaccessible
        return f"OSError {error.errno}", _trace(error)
    except Hung as error:
        return "hung", _trace(error)
    except BaseException as error:  # a panic of a native library is no Exception
        return type(error).__name__, _trace(error)
    finally:
        signal.alarm(0)
    return "ok", ""


@contextlib.contextmanager
def damaged(directory: Path, damage: Damage, work: Path) -> Iterator[Path]:
    """A copy of the directory with the damage, removed afterwards; its other files are hard links to the originals."""
    copy = work / directory.name
    shutil.copytree(directory, copy, copy_function=os.link)
    (copy / damage.file).unlink()
    try:
        damage.apply(copy)
        yield copy
    finally:
        shutil.rmtree(copy)


def _trace(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/convert/" in frame.filename]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-3:]))
    return f"{str(error)[:200]} at {where}"


def locations(value: Any, above: Location = ()) -> Iterator[Location]:
    keys = list(value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ())
    for key in keys if len(keys) < _LARGE and isinstance(value, dict) else keys[:_ENTRIES]:
        yield (*above, key)
        yield from locations(value[key], (*above, key))


_MARK = "a value that is replaced"


def with_value(document: Any, location: Location, text: str) -> str:
    copy = json.loads(json.dumps(document))
    holder = _holder(copy, location)
    holder[location[-1]] = _MARK
    return json.dumps(copy).replace(json.dumps(_MARK), text)


def without(document: Any, location: Location) -> Any:
    copy = json.loads(json.dumps(document))
    del _holder(copy, location)[location[-1]]
    return copy


def _holder(document: Any, location: Location) -> Any:
    for key in location[:-1]:
        document = document[key]
    return document


def writing(file: str, content: bytes) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / file).write_bytes(content)

    return apply


def _placing(file: str, place: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        place(directory / file)

    return apply


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _dangling(path: Path) -> None:
    path.symlink_to("missing")


def _unreadable(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0)


_PLACES: Mapping[str, Callable[[Path], None]] = {
    "missing": lambda path: None,
    "a directory": Path.mkdir,
    "a dangling link": _dangling,
    "a link to itself": _loop,
    "a named pipe": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "unreadable": _unreadable,
}


def main() -> None:
    from tests.convert.damaged_inputs import SCRATCH, DamagedInputs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="", help="only files whose path, DIRECTORY/FILE, holds it")
    parser.add_argument("--command", default="", help="only this command")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth damage")
    asked = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="graft-damage-") as home:
        inputs = DamagedInputs.make(Path(home))
        (inputs.work / SCRATCH).mkdir()
        tempfile.tempdir = str(inputs.work / SCRATCH)
        for number, case in enumerate(inputs.cases()):
            if asked.part not in f"{case.directory.name}/{case.damage.file}" or number % asked.every:
                continue
            with damaged(case.directory, case.damage, inputs.work) as copy:
                for command, work in case.commands.items():
                    if asked.command not in ("", command):
                        continue
                    code, message = outcome_and_message(lambda: work(copy))  # noqa: B023
                    counts[f"{command}: {code}"] += 1
                    left = inputs.left_behind(copy)
                    if left or not case.is_expected(code, message):
                        print(f"{command} {case.directory.name}/{case.damage}: {code}: {message} {left}", flush=True)
    for result, count in sorted(counts.items()):
        print(f"{count:6} {result}")


if __name__ == "__main__":
    main()
