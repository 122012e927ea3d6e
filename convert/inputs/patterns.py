"""The regular expressions in adapter_config.json, matched against the paths of modules as PEFT matches them.

The checkpoint's author wrote them, so that the time to match them is limited (`require_quick`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from convert.artifact.file_names import ADAPTER_CONFIG
from convert.artifact.json_files import shown
from convert.inputs.limits import TimeLimitExceeded, time_limit

OF_VALUES = ("rank_pattern", "alpha_pattern")
# A rank and an alpha for each module of a model with 126 layers take two seconds.
_MAX_S = 30.0

_BY_VALUE = r"(.*\.)?({})$"
_PART_OF_PATH = r"(^|.*\.){}($|\..*)"
_BEFORE_LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
# How peft 0.21 uses a setting of each type; `{}` is a pattern of it. An expression that is nothing else must match the
# whole path.
_PEFT_USES: tuple[tuple[str, type[object], str], ...] = (
    ("rank_pattern", dict, _BY_VALUE),
    ("alpha_pattern", dict, _BY_VALUE),
    ("target_modules", str, "{}"),
    ("target_modules", list, _PART_OF_PATH),
    ("exclude_modules", str, "{}"),
    ("modules_to_save", list, _PART_OF_PATH),
    ("layers_pattern", str, _BEFORE_LAYER),
    ("layers_pattern", list, _BEFORE_LAYER),
)


class PatternInvalid(Exception):
    """A pattern can't be used. The message says why, and what to do."""


def require_quick(adapter_config: Mapping[str, Any], paths: Iterable[str]) -> None:
    """Match every pattern against these paths of modules. Raises PatternInvalid where that would take too long.

    What is no valid pattern is passed over: `valid_patterns` reports it, and a name need not be one.
    """
    paths, current = sorted(set(paths)), ""
    try:
        with time_limit(_MAX_S):
            for setting, pattern, expression in _expressions(adapter_config):
                current = f"{setting} of {ADAPTER_CONFIG}, pattern {shown(pattern)}"
                _try(expression, paths, whole=expression == pattern)
    except TimeLimitExceeded as limit:
        raise PatternInvalid(
            f"{current}: matching takes {limit}: write it without a repetition within a repetition, or list the "
            "modules by their names"
        ) from None


def valid_patterns(setting: str, adapter_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The patterns of a setting of OF_VALUES with their values, each of which is a valid one. Raises PatternInvalid."""
    patterns = adapter_config.get(setting)
    if not isinstance(patterns, dict | None):
        raise PatternInvalid(
            f"{setting} is {shown(patterns)}, not an object of patterns: write the one of the training run"
        )
    try:
        for pattern in patterns or {}:
            _compiled(pattern)
    except (re.error, RecursionError, OverflowError) as cause:
        raise PatternInvalid(f"{setting} holds no valid pattern ({cause})") from None
    return patterns or {}


def by_pattern(patterns: Mapping[str, Any], path: str, default: object) -> Any:
    """The value of the first pattern that matches the path of a module in the model that was trained."""
    return next((value for pattern, value in patterns.items() if _matches(pattern, path)), default)


def unmatched_patterns(adapter_config: Mapping[str, Any], paths: Iterable[str]) -> Iterator[str]:
    """`rank_pattern: KEY` for every pattern that matches no adapted module: PEFT ignores it."""
    paths = list(paths)
    for setting in OF_VALUES:
        patterns = adapter_config.get(setting) or {}
        for pattern in patterns if paths else ():
            if not any(_matches(pattern, path) for path in paths):
                yield f"{setting}: {pattern}"


def _expressions(adapter_config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Setting, pattern, and the expression in which PEFT uses the pattern."""
    for setting, kind, use in _PEFT_USES:
        value: Any = adapter_config.get(setting)
        patterns: Iterable[Any] = [value] if kind is str else value
        if type(value) is kind:
            for pattern in patterns:
                if isinstance(pattern, str):
                    yield setting, pattern, use.replace("{}", pattern)


def _try(expression: str, paths: Iterable[str], *, whole: bool) -> None:
    with contextlib.suppress(re.error, RecursionError, OverflowError):
        compiled = re.compile(expression)
        for path in paths:
            compiled.fullmatch(path) if whole else compiled.match(path)


def _matches(pattern: str, path: str) -> bool:
    return _compiled(pattern).match(path) is not None


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    """As `get_pattern_key` of peft 0.21: the pattern matches the whole path, or its end after a dot."""
    return re.compile(_BY_VALUE.replace("{}", pattern))
