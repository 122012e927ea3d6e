"""GPTQ and AWQ by llm-compressor: weights of 8 or 4 bits that are chosen with calibration text.

llm-compressor and vLLM need different versions of the same packages. So llm-compressor runs in a process of its own,
with the same Python and a directory of packages that comes before the others. `deploy/environment/create.py` installs
that directory from `deploy/environment/quantize.lock`. The process has the whole model in memory, on a CPU in float32.
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

from convert.artifact.json_files import read_json
from convert.errors import FormatRefused, QuantizerFailed, QuantizerMissing
from convert.progress import Progress
from convert.quantization import llmcompressor_worker
from convert.quantization.compressed import Compressed
from convert.safetensors_io.tensors import DTYPES

Method = Literal["gptq", "awq"]
CalibratedName = Literal["w4a16", "w8a8-int8"]

PACKAGES = Path(sys.prefix) / "quantizers"

_SHOWN_CHARACTERS = 1500
_STEP = "calibrating layers"


def quantize_calibrated(
    model: Path,
    out: Path,
    method: Method,
    quantization: CalibratedName,
    rows: Sequence[Sequence[int]],
    progress: Progress,
    *,
    dtype: str = "BF16",
    packages: Path = PACKAGES,
) -> str:
    """Quantize a complete model directory in 16 or 32 bits into `out`: weights and configuration, no tokenizer.

    `rows`: the token ids to calibrate on, used in their order; `dtype`: the type of what stays unquantized. The same
    input gives the same bytes on the same machine. Returns the quantizer's identity for the manifest: library, version,
    method and a digest of the rows. Raises QuantizerMissing without `packages`, FormatRefused where no group size of
    w4a16 fits or AWQ is asked for 8 bits, QuantizerFailed with the end of the library's output.
    """
    config = read_json(model / "config.json", QuantizerFailed)
    settings = Compressed.fitting(quantization, _widths(config), dtype)
    _require_usable(model, config, method, quantization, rows)
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
        "ignore": settings.config()["ignore"],
        "dtype": DTYPES[dtype][1],
        "rows": [list(row) for row in rows],
    }
    library = _run(request, packages, progress)
    return f"{library}, {method} {quantization}{_groups(settings)}, calibrated on {len(rows)} rows {rows_digest(rows)}"


def rows_digest(rows: Sequence[Sequence[int]]) -> str:
    """SHA-256 of the token ids as text: a line for each row, ids in decimal with a space between."""
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
            f"config.json has no valid sizes of the layers ({cause!r}). Copy the model again."
        ) from None


def _require_usable(
    model: Path, config: Mapping[str, Any], method: Method, quantization: CalibratedName, rows: Sequence[Sequence[int]]
) -> None:
    if config.get("quantization_config"):
        raise QuantizerFailed(f"{model} is quantized already. Give the merged model in 16 or 32 bits.")
    if method == "awq" and quantization != "w4a16":
        raise FormatRefused(f"AWQ is for w4a16 only. For {quantization} choose --method gptq or rtn.")
    vocabulary = config.get("vocab_size")
    if not rows or not all(rows):
        raise QuantizerFailed("There is nothing to calibrate on: give at least one row, and none that is empty.")
    if not isinstance(vocabulary, int) or any(not 0 <= token < vocabulary for row in rows for token in row):
        raise QuantizerFailed(f"A calibration row has a token id outside the model's vocabulary of {vocabulary}.")


def _run(request: Mapping[str, Any], packages: Path, progress: Progress) -> str:
    """Run the quantizer. Returns the library's name and version."""
    command = [sys.executable, "-P", str(Path(llmcompressor_worker.__file__))]
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
            library = _exchange(process, request, progress)
        finally:
            process.kill()
            process.wait()
        if library is None:
            raise QuantizerFailed(f"llm-compressor stopped: {_end_of_errors(errors)}")
    return library


def _exchange(process: subprocess.Popen[str], request: Mapping[str, Any], progress: Progress) -> str | None:
    """Send the request and follow the answers. None where the process failed."""
    assert process.stdin
    assert process.stdout
    library = None
    try:
        with process.stdin as stdin:
            stdin.write(json.dumps(request) + "\n")
    except BrokenPipeError:
        pass  # the exit status and the errors say why the process ended
    for line in process.stdout:
        message = json.loads(line)
        if "of" in message:
            progress(_STEP, message["step"], message["of"])
        library = message.get("library", library)
    return library if process.wait() == 0 else None


def _environment(packages: Path) -> dict[str, str]:
    paths = [str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def _end_of_errors(errors: IO[str]) -> str:
    errors.seek(0)
    text = errors.read().strip()
    return text[-_SHOWN_CHARACTERS:] or "it printed no error; the system may have killed it for lack of memory."
