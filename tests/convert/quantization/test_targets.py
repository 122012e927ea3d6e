"""The table of what is served where, and the page that shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from convert.errors import TargetUnknown
from convert.quantization.targets import (
    CPUS,
    EXAMPLES,
    QUANTIZATIONS,
    merged_order,
    support,
    target_here,
    works,
)

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "formats.md"
WORDS = {True: "yes", False: "no"}
FLAGS = "flags\t\t: fpu vme sse2 avx avx2 {} fma\n"
AVX512 = "avx512f avx512dq avx512cd avx512bw avx512vl"


def rows(heading: str) -> set[tuple[str, ...]]:
    """Cells of the rows of a section's tables whose first cell is a target."""
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [tuple(cell.strip(" `") for cell in line.strip("|").split("|")) for line in section.splitlines()]
    return {row for row in cells if row[0] in EXAMPLES}


def test_the_page_shows_the_table() -> None:
    expected = set()
    for target in EXAMPLES:
        for quantization in QUANTIZATIONS:
            supported = support(target, quantization)
            answers = (WORDS[supported.loads], WORDS[supported.generates], WORDS[supported.with_adapter])
            expected.add((target, quantization, *answers, supported.evidence, supported.note))

    assert rows("Support in vLLM") == expected


def test_the_page_shows_which_formats_of_a_merged_model_are_tried() -> None:
    names = {"nf4": "nf4-double"}  # the command line's name, and the format's

    assert rows("Defaults") == {
        (target, "`, `".join(names.get(name, name) for name in merged_order(target))) for target in EXAMPLES
    }


def test_every_format_is_explained() -> None:
    section = PAGE.read_text().partition("# Formats\n")[2].partition("\n## ")[0]

    assert set(re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)) == set(QUANTIZATIONS)


@pytest.mark.parametrize("target", EXAMPLES)
def test_the_default_base_of_a_separate_adapter_works(target: str) -> None:
    assert works(target, "nf4-double", with_adapter=True)


@pytest.mark.parametrize("target", EXAMPLES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_nothing_answers_that_does_not_load(target: str, quantization: str) -> None:
    supported = support(target, quantization)  # type: ignore[arg-type]

    assert supported.loads >= supported.generates >= supported.with_adapter
    assert (supported.loads and supported.generates) or supported.note


def test_only_what_ran_on_a_kind_of_machine_counts_as_seen() -> None:
    seen = {(target, name) for target in EXAMPLES for name in QUANTIZATIONS if support(target, name).evidence == "seen"}

    on_avx2 = {("cpu", name) for name in QUANTIZATIONS if name != "nf4"}
    on_vnni = {("cpu:avx512-vnni", name) for name in QUANTIZATIONS}
    assert seen == on_avx2 | on_vnni | {("cpu:amx", "w8a8-int8")}


@pytest.mark.parametrize("target", CPUS)
def test_int8_is_chosen_on_a_cpu_only_where_its_sums_fit(target: str) -> None:
    """Without VNNI they saturate, with AVX-512 or not."""
    has_vnni = target in ("cpu:avx512-vnni", "cpu:amx")

    assert ("w8a8-int8" in merged_order(target)) == has_vnni
    assert ("saturate" in support(target, "w8a8-int8").note) != has_vnni


def test_adapters_on_int8_need_a_kernel_that_keeps_its_weights() -> None:
    """oneDNN's doesn't, and vLLM takes another one only for AMX."""
    assert {target for target in CPUS if works(target, "w8a8-int8", with_adapter=True)} == {"cpu:amx"}


def test_four_bits_with_16_bit_activations_need_avx512() -> None:
    assert {target for target in CPUS if works(target, "w4a16", with_adapter=True)} == set(CPUS) - {"cpu"}


def test_a_gpu_between_two_of_the_table_is_as_the_lower_one() -> None:
    assert not works("cuda:12.1", "w8a8-int8", with_adapter=False)
    assert works("cuda:8.6", "w8a8-int8", with_adapter=True)
    assert support("cuda:8.6", "fp8-dynamic") == support("cuda:8.0", "fp8-dynamic")
    assert merged_order("cuda:12.1") == merged_order("cuda:9.0")


@pytest.mark.parametrize("target", CPUS)
def test_widths_of_which_the_table_warns_are_refused(target: str) -> None:
    fitting, unfit = {(64, 64), (32, 128)}, {(64, 64), (64, 96)}

    for quantization in QUANTIZATIONS:
        needs_64 = "multiples of 64" in support(target, quantization).note
        assert works(target, quantization, with_adapter=False, shapes=fitting) == works(
            target, quantization, with_adapter=False
        )
        assert not (needs_64 and works(target, quantization, with_adapter=False, shapes=unfit))
    assert works("cpu:avx512", "w4a16", with_adapter=True, shapes=unfit)
    assert not works("cpu:avx512", "w4a16", with_adapter=True, shapes={(64, 48)})
    assert works("cpu:amx", "w8a8-int8", with_adapter=False, shapes={(64, 48)})
    assert not works("cpu:amx", "w8a8-int8", with_adapter=True, shapes={(64, 48)})


@pytest.mark.parametrize("target", ["tpu", "cuda", "cuda:9", "cuda:9.x", "cuda: 9.0", "", "cuda:7.0", "CPU"])
def test_an_unknown_target_is_refused(target: str) -> None:
    for question in (lambda: support(target, "none"), lambda: merged_order(target)):
        with pytest.raises(TargetUnknown, match=re.escape(repr(target) if ":7" not in target else target)):
            question()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU comes first")
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        pytest.param("bmi2", "cpu", id="Zen 3"),
        pytest.param("bmi2 avx_vnni", "cpu", id="Alder Lake"),
        pytest.param("avx512f avx512cd avx512er avx512pf", "cpu", id="Knights Landing"),
        pytest.param(AVX512, "cpu:avx512", id="Skylake"),
        pytest.param(f"{AVX512} avx512_vnni", "cpu:avx512-vnni", id="Ice Lake"),
        pytest.param(f"{AVX512} avx512_bf16 avx512_vnni", "cpu:avx512-vnni", id="Zen 4"),
        pytest.param(f"{AVX512} avx512_bf16 avx512_vnni amx_bf16 amx_tile amx_int8", "cpu:amx", id="Sapphire Rapids"),
    ],
)
def test_the_cpu_is_known_by_its_flags(tmp_path: Path, flags: str, expected: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\n" + FLAGS.format(flags) * 2)

    assert target_here(cpuinfo) == expected
    assert target_here(tmp_path / "missing") == "cpu"


def test_this_machine_is_a_target() -> None:
    assert support(target_here(), "none").generates


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU comes first")
def test_a_cpu_is_judged_as_vllm_judges_it() -> None:
    """vLLM chooses libraries and kernels by the first and the last of these questions, oneDNN by all of them."""
    target = target_here()

    assert torch.cpu._is_avx512_supported() == (target != "cpu")
    assert torch.cpu._is_vnni_supported() == (target in ("cpu:avx512-vnni", "cpu:amx"))
    assert torch.cpu._is_amx_tile_supported() == (target == "cpu:amx")
