"""What `plan` says that a conversion takes, against what a real one takes, and what happens where that is not there.

A real conversion runs in a process of its own. Its memory is the peak of the resident set; its disk is the largest sum
of its files at the destination.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from convert.errors import MemoryShort, OutputUnwritable
from convert.pipeline.dry_run import dry_run
from convert.pipeline.request import Request as FullRequest
from convert.plan import machine
from convert.plan.machine import FreeMemory
from convert.plan.phases import LIBRARY_BYTES
from convert.progress import silent
from convert.quantization.llmcompressor import PACKAGES
from convert.routes.choose import RouteOptions
from convert.routes.variants import QuantizeOption
from tests.convert import parts
from tests.convert.asking import Request, convert

LAYERS, HIDDEN = 5, 1536
TOLERANCE = 0.25
# A process that starts one other and gives its peak: getrusage of this process would count those of other tests.
WATCH = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
print(done.stderr[-2000:], file=sys.stderr)
print(1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


@dataclass(frozen=True)
class Conversion:
    checkpoint: str
    options: tuple[str, ...]


CONVERSIONS = {
    "QLoRA, as it is": Conversion("qlora", ()),
    "exact merge of a QLoRA": Conversion("qlora", ("--route", "merge", "--quantize", "none")),
    "int8": Conversion("lora", ("--route", "merge", "--quantize", "w8a8-int8")),
    "LoRA, several candidates": Conversion("lora", ()),
    "nothing measured": Conversion("lora", ("--no-measure",)),
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose layers are as large in float32 as the libraries, and a LoRA and a QLoRA of it."""
    return save_inputs(tmp_path_factory.mktemp("large"), LAYERS)


def save_inputs(home: Path, layers: int) -> Path:
    base = parts.save_base(home / "base", tied=True, layers=layers, hidden=HIDDEN)
    parts.mark_lora(parts.save_adapter(base, home / "lora"))
    parts.mark_qlora(parts.save_adapter(base, home / "qlora"))
    rows = [{"text": f"the rain in spain falls on plain {number}"} for number in range(10)]
    (home / "calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    (home / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[5:8]))
    return home


def command(verb: str, large: Path, conversion: Conversion, *more: object) -> list[str]:
    words = [sys.executable, "-m", "convert", verb, large / conversion.checkpoint, "--base", large / "base"]
    return list(map(str, [*words, "--text", large / "text.jsonl", *conversion.options, *more, "--json"]))


def planned(large: Path, conversion: Conversion) -> tuple[int, int]:
    """Memory and disk of all candidates together, of which `run` builds one after the other."""
    done = subprocess.run(command("plan", large, conversion), capture_output=True, text=True, check=True)
    estimates = [way["estimate"] for way in json.loads(done.stdout)["ways"] if way["estimate"]]
    if "--no-measure" in conversion.options:
        estimates = estimates[-1:]
    return max(each["memory_bytes"] for each in estimates), max(each["disk_bytes"] for each in estimates)


def taken(words: Sequence[str], destination: Path) -> tuple[int, int]:
    """The peaks of memory and disk of a command that writes beside `destination`."""
    destination.parent.mkdir()
    disk = 0
    with subprocess.Popen([sys.executable, "-c", WATCH, *words], stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            disk = max(disk, written_bytes(destination.parent))
            time.sleep(0.05)
        assert process.stdout
        memory = process.stdout.read()
    assert process.returncode == 0
    return int(memory), max(disk, written_bytes(destination.parent))


def is_near(planned: int, peak: int) -> bool:
    """How much of what was freed the allocator still holds differs between runs; too little is worse than too much."""
    return (1 - TOLERANCE) * peak < planned < (1 + 2 * TOLERANCE) * peak


def written_bytes(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += (Path(folder) / name).stat().st_size
            except FileNotFoundError:  # removed meanwhile
                continue
    return total


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_takes_the_memory_and_disk_that_the_plan_says(large: Path, tmp_path: Path, name: str) -> None:
    conversion, out = CONVERSIONS[name], tmp_path / "published" / "tiny"
    memory, disk = planned(large, conversion)

    peak_memory, peak_disk = taken(command("run", large, conversion, "--out", out), out)

    assert is_near(memory, peak_memory)
    assert disk == pytest.approx(peak_disk, rel=TOLERANCE)


@pytest.mark.skipif(not PACKAGES.is_dir(), reason="llm-compressor is not installed")
def test_a_calibrated_quantizer_takes_the_memory_and_disk_that_the_plan_says(tmp_path: Path) -> None:
    """The process of the quantizer has the model, as its float32 copy on the disk has."""
    large = save_inputs(tmp_path, layers=2)
    options = ("--route", "merge", "--quantize", "w4a16", "--method", "gptq", "--no-measure", "--target", "cuda:9.0")
    conversion = Conversion("lora", (*options, "--calibration", str(large / "calibration.jsonl")))
    out = tmp_path / "published" / "tiny"
    memory, disk = planned(large, conversion)

    peak_memory, peak_disk = taken(command("run", large, conversion, "--out", out), out)

    # The larger process; that which waits for it has no more than its libraries.
    assert is_near(memory - LIBRARY_BYTES, peak_memory)
    assert disk == pytest.approx(peak_disk, rel=TOLERANCE)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: FreeMemory(10**6, "the cgroup of this container or job"))
    monkeypatch.setattr(machine, "resident_bytes", lambda: 10**8)


@pytest.mark.usefixtures("little_memory")
def test_a_run_that_does_not_fit_in_memory_is_refused_before_the_first_byte(lora: Path, base: Path, out: Path) -> None:
    steps: list[str] = []

    with pytest.raises(MemoryShort, match=r"needs about 0\.\d+ GB of memory, and the cgroup .* has 0\.10 GB") as caught:
        convert(Request(lora, base, out), lambda step, done, total: steps.append(step))

    assert caught.value.code == "memory_short"
    assert "--no-measure" in str(caught.value)
    assert not steps
    assert not list(out.parent.iterdir())


@pytest.mark.usefixtures("little_memory")
def test_the_comparison_of_losses_is_refused_as_well(unmarked: Path, base: Path, out: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "the rain in spain"}) + "\n")

    with pytest.raises(MemoryShort, match="Say it with --trained-on"):
        convert(Request(unmarked, base, out, text=text))


@pytest.mark.usefixtures("little_memory")
def test_the_plan_warns_of_what_run_would_refuse(lora: Path, base: Path, out: Path) -> None:
    variants = dry_run(Request(lora, base, out, route="merge").full, silent).variants

    assert all("needs about" in planned.shortages[0] for planned in variants if planned.candidate)


@pytest.mark.parametrize(("quantize", "method"), [("w4a16", "gptq"), ("w8a8-int8", "gptq"), ("w4a16", "awq")])
def test_the_float32_copy_for_a_calibrated_quantizer_counts_as_disk(
    lora: Path, base: Path, out: Path, tmp_path: Path, quantize: QuantizeOption, method: str
) -> None:
    calibration = tmp_path / "calibration.jsonl"
    calibration.write_text(json.dumps({"text": "rain"}) + "\n")
    options = RouteOptions("merge", quantize)
    request = FullRequest(lora, base, options, target="cuda:9.0", calibration=calibration)
    rounded, calibrated = (
        dry_run(each, silent).variants[0].estimate
        for each in (replace(request, method="rtn"), replace(request, method=method))  # type: ignore[arg-type]
    )

    assert rounded
    assert calibrated
    stored_in_16_bits = (base / "model.safetensors").stat().st_size
    assert calibrated.output_bytes == rounded.output_bytes
    assert calibrated.disk_bytes - rounded.disk_bytes == pytest.approx(2 * stored_in_16_bits, rel=0.05)


def test_the_output_of_a_calibrated_recovery_counts_the_adapter_that_is_kept_beside_it(
    qlora: Path, base: Path, tmp_path: Path
) -> None:
    calibration = tmp_path / "calibration.jsonl"
    calibration.write_text(json.dumps({"text": "rain"}) + "\n")
    options = RouteOptions("recover", "w4a16")
    request = FullRequest(qlora, base, options, target="cuda:9.0", calibration=calibration, method="gptq", rank=64)

    (planned,) = dry_run(request, silent).variants

    assert planned.estimate
    assert planned.candidate
    assert planned.candidate.plan
    by_peft = get_peft_model(parts.load_float32(base), LoraConfig(r=64, target_modules="all-linear"))
    adapter_bytes = sum(4 * weight.numel() for weight in by_peft.parameters() if weight.requires_grad)
    assert planned.estimate.output_bytes - planned.candidate.plan.weight_bytes == adapter_bytes


def test_a_full_disk_of_temporary_files_is_noticed_before_writing(
    lora: Path, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path))
    real = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: real(path) if Path(path) != tmp_path else real(path)._replace(free=10)
    )

    with pytest.raises(OutputUnwritable, match="set TMPDIR to a larger disk"):
        convert(Request(lora, base, out, route="merge", quantize="none"))
