"""The directories whose files are damaged, and the commands that read them, as the command line calls them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file, save_file

from convert.artifact import Artifact
from convert.cli.report.inspection import inspection_document, inspection_screen
from convert.cli.report.plan import plan_document, plan_screen
from convert.cli.report.screen import Page
from convert.inputs.base_model import BaseModel
from convert.pipeline.compare import compare, write_report
from convert.pipeline.dry_run import dry_run
from convert.pipeline.inspect import inspect
from convert.progress import silent
from convert.routes.variants import RouteOption
from convert.verification.engine import context_tokens
from convert.verification.verify import _served_model, golden_of, stop_token_ids
from tests.convert import parts, trainers
from tests.convert.asking import Request, convert
from tests.convert.damage import Damage, of_file, of_keys
from tests.convert.damaged_tensors import of_tensors

# Settings that these files may have, besides those that the small ones have.
ADDED: Mapping[str, Mapping[str, Any]] = {
    "adapter_config.json": {
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {"q_proj": 16},
        "trainable_token_indices": None,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "layers_to_transform": None,
        "revision": None,
    },
    "config.json": {
        "head_dim": 16,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "quantization_config": None,
        "text_config": None,
        "layer_types": None,
        "num_labels": 2,
        "id2label": {"0": "A", "1": "B"},
        "torch_dtype": "bfloat16",
        "auto_map": None,
        "sliding_window": None,
    },
    "generation_config.json": {"temperature": 0.6, "top_k": 20, "max_length": 4096},
    "tokenizer_config.json": {
        "chat_template": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "pad_token": "</s>",
        "padding_side": "left",
        "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
        "additional_special_tokens": [],
        "auto_map": None,
    },
    "tokenizer.json": {"truncation": None, "padding": None},
    "special_tokens_map.json": {},
}
# The files of a base that the command `compare` is tried with too.
_COMPARED = ("config.json", "model.safetensors.index.json", "generation_config.json")
SCRATCH = "tmp"
_TEXT = '{"text": "the rain in spain"}\n{"messages": [{"role": "user", "content": "the rain"}]}\n'


@dataclass(frozen=True)
class Case:
    """A damage to a file of the directory, and the commands that read a copy with it."""

    directory: Path
    damage: Damage
    commands: Mapping[str, Callable[[Path], object]]

    def is_expected(self, code: str, message: str) -> bool:
        """Success, or an error of a stable code; or the system's own, for a file that it refuses to read."""
        return code == "ok" or code in ("OSError 13", "OSError 40") or (code.islower() and "_" in code)


@dataclass(frozen=True)
class DamagedInputs:
    """A checkpoint with the files of every trainer, bases in every format, artifacts, and texts."""

    work: Path
    checkpoint: Path
    qlora: Path
    base: Path
    bases: tuple[Path, ...]
    artifact: Path
    texts: Path

    @classmethod
    def make(cls, home: Path) -> DamagedInputs:
        base = parts.save_base(home / "base", tied=True)
        lora = parts.mark_lora(parts.save_adapter(base, home / "lora"))
        return cls.of(home, base, lora)

    @classmethod
    def of(cls, home: Path, base: Path, lora: Path) -> DamagedInputs:
        bases = (
            _sharded(base, home / "sharded"),
            parts.save_compressed(base, home / "compressed", "w8a8-int8"),
            parts.save_quantized(base, home / "nf4"),
        )
        artifact = home / "artifact"
        convert(Request(lora, base, artifact, route="adapter", quantize="none"))
        (home / "work").mkdir()
        checkpoint = _full_checkpoint(lora, base, home / "checkpoint")
        qlora = parts.mark_qlora(parts.copy(lora, home / "qlora-of-lora"))
        return cls(home / "work", checkpoint, qlora, base, bases, artifact, _texts(home))

    def cases(self) -> Iterator[Case]:
        yield from self._of_checkpoint()
        yield from self._of_bases()
        yield from self._of_artifact()
        for file in ("text.jsonl", "canaries.jsonl"):
            for damage in of_file(self.texts, file):
                yield Case(self.texts, damage, {"run": self._measured_on})

    def _of_checkpoint(self) -> Iterator[Case]:
        inspected = {"inspect": lambda copy: inspected_of(copy, self.base)}
        planned = inspected | {"plan": lambda copy: planned_of(copy, self.base)}
        converted = planned | {"run": lambda copy: self._converted(copy, self.base)}
        for file in sorted(path.relative_to(self.checkpoint).as_posix() for path in self.checkpoint.rglob("*.*")):
            if (self.checkpoint / file).is_dir() or file.endswith(".safetensors"):
                continue
            is_of_tokenizer = file in ADDED or file.endswith(".jinja")
            commands = converted if file == "adapter_config.json" else planned if is_of_tokenizer else inspected
            for damage in _damages(self.checkpoint, file):
                yield Case(self.checkpoint, damage, commands)

    def _of_bases(self) -> Iterator[Case]:
        for directory in (self.base, *self.bases):
            checkpoint = self.qlora if directory.name == "nf4" else self.checkpoint
            read = {
                "inspect": partial(inspected_of, checkpoint),
                "plan": partial(planned_of, checkpoint),
                "run": partial(self._converted, checkpoint),
            }
            compared = read | {"compare": partial(self._compared, checkpoint)}
            for file in sorted(path.name for path in directory.iterdir()):
                if file.endswith(".safetensors"):
                    damages, commands = of_tensors(directory, file), read
                elif directory == self.base or file in ("config.json", "model.safetensors.index.json"):
                    damages, commands = _damages(directory, file), compared if file in _COMPARED else read
                else:
                    continue
                for damage in damages:
                    yield Case(directory, damage, commands)

    def _of_artifact(self) -> Iterator[Case]:
        for file in ("manifest.json", "golden.json", "model/config.json", "model/generation_config.json"):
            for damage in _damages(self.artifact, file):
                yield Case(self.artifact, damage, {"verify": verified, "verify, without its digests": read_as_served})

    def _converted(self, checkpoint: Path, base: Path) -> None:
        self._run(Request(checkpoint, base, self.work / "out", route="merge", quantize="none"))

    def _measured_on(self, texts: Path) -> None:
        self._run(Request(self.checkpoint, self.base, self.work / "out", route="merge", quantize="none",
                          text=texts / "text.jsonl", canaries=texts / "canaries.jsonl"))  # fmt: skip

    def _compared(self, checkpoint: Path, base: Path) -> None:
        page = self.work / "page"
        try:
            run = compare(Request(checkpoint, base, page).full, ["merge:none"], speed=False, progress=silent)
            write_report(run, page)
        finally:
            shutil.rmtree(page, ignore_errors=True)

    def left_behind(self, copy: Path) -> list[str]:
        """What commands left beside the damaged copy, or in the folder for temporary files below `work`."""
        scratch = self.work / SCRATCH
        entries = [*self.work.iterdir(), *(scratch.iterdir() if scratch.is_dir() else ())]
        return sorted(path.name for path in entries if path not in (copy, scratch))

    def _run(self, request: Request) -> None:
        try:
            convert(request)
        except BaseException:
            assert not request.destination.exists(), "half of an artifact is left"
            raise
        finally:
            shutil.rmtree(request.destination, ignore_errors=True)


def inspected_of(checkpoint: Path, base: Path) -> None:
    inspection = inspect(checkpoint, base)
    json.dumps(inspection_document(inspection), ensure_ascii=False).encode()
    _printed(inspection_screen(inspection))


def planned_of(checkpoint: Path, base: Path, route: RouteOption = "merge") -> None:
    planned = dry_run(Request(checkpoint, base, Path("nowhere"), route=route, quantize="none").full, silent)
    json.dumps(plan_document(planned), ensure_ascii=False).encode()
    _printed(plan_screen(planned))


def verified(root: Path) -> None:
    Artifact.open(root).verify()


def read_as_served(root: Path) -> None:
    """What `verify` reads before the engine starts, where the digests are those of the damaged files."""
    artifact = Artifact.open(root)
    if artifact.model_path:
        stop_token_ids(artifact.model_path)
        context_tokens(_served_model(artifact, artifact.model_path, 256))
        BaseModel.open(root)
    golden_of(artifact)


def _printed(page: Page) -> None:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8"), width=80)
    for part in page:
        console.print(part)


def _damages(directory: Path, file: str) -> Iterator[Damage]:
    if file.endswith(".json"):
        yield from of_keys(directory, file, ADDED.get(Path(file).name))
    yield from of_file(directory, file)


def _full_checkpoint(lora: Path, base: Path, directory: Path) -> Path:
    """Files of every trainer, which agree that it is a LoRA, and a tokenizer of its own."""
    parts.copy(lora, directory)
    trainers.ms_swift_2(directory, "lora")
    trainers.axolotl(directory, "lora")
    trainers.llama_factory(directory, "lora")
    trainers.llama_board(directory, "lora")
    stamp = {"schema": "graft.training/1", "trained_on": "full", "quantizer": None}
    (directory / "graft_training.json").write_text(json.dumps(stamp))
    (directory / "original_repo_id.json").write_text(json.dumps({"repo_id": "acme/tiny-llama"}))
    recipe = {"model": {"_component_": "torchtune.models.llama3_2.lora_llama3_2_3b"}}
    (directory / "torchtune_config.yaml").write_text(json.dumps(recipe))
    shutil.copy(base / "config.json", directory)
    parts.save_tokenizer(directory)
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": parts.TEMPLATE}))
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text(parts.TEMPLATE)
    return directory


def _sharded(base: Path, directory: Path) -> Path:
    copied = parts.copy(base, directory)
    tensors = sorted(load_file(copied / "model.safetensors").items())
    (copied / "model.safetensors").unlink()
    weight_map = {}
    for number, shard in enumerate((tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(dict(shard), copied / file, {"format": "pt"})
        weight_map |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    return copied


def _texts(home: Path) -> Path:
    directory = home / "texts"
    directory.mkdir()
    (directory / "text.jsonl").write_text(_TEXT)
    canary = {"messages": [{"role": "user", "content": "the rain"}], "expect": "spain"}
    (directory / "canaries.jsonl").write_text(json.dumps(canary) + "\n")
    return directory
