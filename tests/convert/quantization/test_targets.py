"""The table of what is served where, and the page that shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from convert.errors import TargetUnknown
from convert.targets import EXAMPLES, QUANTIZATIONS, defaults, support, target_here, works

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
WORDS = {True: "yes", False: "no"}
FLAGS = "flags\t\t: fpu vme sse2 avx avx2 {} fma\n"


def rows(heading: str) -> set[tuple[str, ...]]:
    """Cells of the rows of a section's tables whose first cell is a target."""
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [tuple(cell.strip(" `") for cell in line.strip("|").split("|")) for line in section.splitlines()]
    return {row for row in cells if row[0] in EXAMPLES}


def test_the_page_shows_the_table() -> None:
    expected = set()
    for target in EXAMPLES:
        for quantization in QUANTIZATIONS:
            found = support(target, quantization)
            answers = (WORDS[found.loads], WORDS[found.generates], WORDS[found.with_adapter])
            expected.add((target, quantization, *answers, found.evidence, found.note))

    assert rows("What vLLM does with them") == expected


def test_the_page_shows_the_defaults() -> None:
    assert rows("Defaults") == {(target, defaults(target).merged, defaults(target).base) for target in EXAMPLES}


def test_every_format_is_explained() -> None:
    section = PAGE.read_text().partition("# Formats\n")[2].partition("\n## ")[0]

    assert set(re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)) == set(QUANTIZATIONS)


@pytest.mark.parametrize("target", EXAMPLES)
def test_what_is_taken_by_default_works(target: str) -> None:
    assert works(target, defaults(target).merged, with_adapter=False)
    assert works(target, defaults(target).base, with_adapter=True)


@pytest.mark.parametrize("target", EXAMPLES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_nothing_answers_that_does_not_load(target: str, quantization: str) -> None:
    found = support(target, quantization)  # type: ignore[arg-type]

    assert found.loads >= found.generates >= found.with_adapter
    assert (found.loads and found.generates) or found.note


def test_only_what_ran_on_this_kind_of_machine_counts_as_seen() -> None:
    seen = {target for target in EXAMPLES for name in QUANTIZATIONS if support(target, name).evidence == "seen"}
    assert seen == {"cpu", "cpu:avx512"}


def test_a_gpu_between_two_of_the_table_is_as_the_lower_one() -> None:
    assert not works("cuda:12.1", "w8a8-int8", with_adapter=False)
    assert works("cuda:8.6", "w8a8-int8", with_adapter=True)
    assert support("cuda:8.6", "fp8-dynamic") == support("cuda:8.0", "fp8-dynamic")
    assert defaults("cuda:12.1") == defaults("cuda:9.0")


@pytest.mark.parametrize("target", ["tpu", "cuda", "cuda:9", "cuda:9.x", "cuda: 9.0", "", "cuda:7.0", "CPU"])
def test_an_unknown_target_is_refused(target: str) -> None:
    for question in (lambda: support(target, "none"), lambda: defaults(target)):
        with pytest.raises(TargetUnknown, match=re.escape(repr(target) if ":7" not in target else target)):
            question()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU comes first")
@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx512f avx512dq avx512bw avx512vl", "cpu:avx512"), ("avx512f", "cpu"), ("bmi2", "cpu")],
)
def test_the_cpu_is_known_by_its_flags(tmp_path: Path, flags: str, expected: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\n" + FLAGS.format(flags) * 2)

    assert target_here(cpuinfo) == expected
    assert target_here(tmp_path / "missing") == "cpu"


def test_this_machine_is_a_target() -> None:
    assert support(target_here(), "none").generates


def test_a_cpu_is_judged_as_vllm_judges_it() -> None:
    """It picks its library of kernels by this question to torch."""
    if not torch.cuda.is_available():
        assert (target_here() == "cpu:avx512") == torch.cpu._is_avx512_supported()
