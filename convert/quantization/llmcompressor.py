"""GPTQ and AWQ: eight or four bits found with the help of calibration text, by llm-compressor.

llm-compressor and vLLM need different versions of the same packages. So llm-compressor runs in a process of its own,
with the same Python and a directory of packages that comes before the others: `deploy/environment/quantize.lock`,
installed by the command that makes the environment. The whole model is in memory there, in float32 on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from convert import calibrate_worker
from convert.compressed import Compressed
from convert.errors import FormatRefused, QuantizerFailed, QuantizerMissing
from convert.progress import Progress
from convert.tensors import DTYPES, read_json

Method = Literal["gptq", "awq"]
CalibratedName = Literal["w4a16", "w8a8-int8"]

PACKAGES = Path(sys.prefix) / "quantizers"

_SHOWN_CHARACTERS = 1500
_STEP = "calibrating layers"


def quantize_calibrated(
    model: Path,
    out: Path,
    method: Method,
    scheme: CalibratedName,
    rows: Sequence[Sequence[int]],
    progress: Progress,
    *,
    dtype: str = "BF16",
    packages: Path = PACKAGES,
) -> str:
    """Quantize a complete model directory in 16 or 32 bits into `out`: weights and configuration, no tokenizer.

    `rows` are the token ids to calibrate on, used in their order; `dtype` is the type of what stays unquantized. The
    same input gives the same bytes on the same machine. Returns the quantizer's identity for the manifest: library,
    version, method and a digest of the rows. Raises QuantizerMissing without `packages`, FormatRefused where no group
    of w4a16 fits or AWQ is asked for eight bits, QuantizerFailed with the library's last words.
    """
    config = read_json(model / "config.json", QuantizerFailed)
    settings = Compressed.fitting(scheme, _widths(config), dtype)
    _require_usable(model, config, method, scheme, rows)
    if not (packages / "llmcompressor").is_dir():
        raise QuantizerMissing(
            f"GPTQ and AWQ need the packages of llm-compressor, which are not in {packages}. Make them with: "
            "python3 deploy/environment/create.py --with quantizers (make environment does it)."
        )
    request = {
        "model": str(model.absolute()),
        "out": str(out.absolute()),
        "method": method,
        "group": settings.group(),
        "dtype": DTYPES[dtype][1],
        "rows": [list(row) for row in rows],
    }
    library = _run(request, packages, progress)
    return f"{library}, {method} {scheme}{_groups(settings)}, calibrated on {len(rows)} rows {rows_digest(rows)}"


def rows_digest(rows: Sequence[Sequence[int]]) -> str:
    """SHA-256 of the token ids: of one line a row, ids in decimal with a space between."""
    text = "".join(f"{' '.join(map(str, row))}\n" for row in rows)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _groups(settings: Compressed) -> str:
    return f" in groups of {settings.group_size}" if settings.group_size else ""


def _widths(config: Mapping[str, Any]) -> list[int]:
    """Input widths of the linear layers of a Llama-like model."""
    try:
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        head = int(config.get("head_dim") or hidden // int(config["num_attention_heads"]))
        return [hidden, inner, head * int(config["num_attention_heads"])]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as cause:
        raise QuantizerFailed(
            f"config.json does not tell the sizes of the layers ({cause!r}). Copy the model again."
        ) from None


def _require_usable(
    model: Path, config: Mapping[str, Any], method: Method, scheme: CalibratedName, rows: Sequence[Sequence[int]]
) -> None:
    if config.get("quantization_config"):
        raise QuantizerFailed(f"{model} is quantized already. Give the merged model in 16 or 32 bits.")
    if method == "awq" and scheme != "w4a16":
        raise FormatRefused(f"AWQ is for w4a16; {scheme} is found by gptq, or by rounding alone.")
    vocabulary = config.get("vocab_size")
    if not rows or not all(rows):
        raise QuantizerFailed("There is nothing to calibrate on: give at least one row, and none that is empty.")
    if not isinstance(vocabulary, int) or any(not 0 <= token < vocabulary for row in rows for token in row):
        raise QuantizerFailed(f"A calibration row has a token id outside the model's vocabulary of {vocabulary}.")


def _run(request: Mapping[str, Any], packages: Path, progress: Progress) -> str:
    """The library's name and version, once it is done."""
    command = [sys.executable, "-P", str(Path(calibrate_worker.__file__))]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(  # noqa: S603 - our own file, no shell
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(packages),
        )
        try:
            library = _talk(process, request, progress)
        finally:
            process.kill()
            process.wait()
        if library is None:
            raise QuantizerFailed(f"llm-compressor stopped: {_last_words(errors)}")
    return library


def _talk(process: subprocess.Popen[str], request: Mapping[str, Any], progress: Progress) -> str | None:
    assert process.stdin
    assert process.stdout
    library = None
    try:
        with process.stdin as questions:
            questions.write(json.dumps(request) + "\n")
    except BrokenPipeError:
        pass  # its exit status and last words say why
    for line in process.stdout:
        answer = json.loads(line)
        if "of" in answer:
            progress(_STEP, answer["step"], answer["of"])
        library = answer.get("library", library)
    return library if process.wait() == 0 else None


def _environment(packages: Path) -> dict[str, str]:
    paths = [str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def _last_words(errors: IO[str]) -> str:
    errors.seek(0)
    text = errors.read().strip()
    return text[-_SHOWN_CHARACTERS:] or "it said nothing; the system may have ended it for want of memory."
