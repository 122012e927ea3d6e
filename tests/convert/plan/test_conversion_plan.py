"""What doesn't fit is reported before anything is written, all of it at once."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from convert.errors import BaseMismatch, BaseUnreadable, OutputUnwritable
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.plan.compatibility import require_compatible
from convert.plan.conversion_plan import OutputFormat, plan_model
from convert.quantization.nf4 import Nf4
from tests.convert import parts
from tests.convert.asking import Request, convert


def run(checkpoint: Path, base: Path, out: Path, **settings: Any) -> Any:
    return convert(
        Request(checkpoint=checkpoint, base=base, destination=out, **{"name": "tiny", "measure": False, **settings})
    )


@pytest.mark.parametrize(
    "output_format",
    [
        OutputFormat(None, Nf4(True)),
        OutputFormat(None, Nf4(False)),
        OutputFormat("dequantized", None, Nf4(True)),
        OutputFormat("original", Nf4(True)),
    ],
    ids=["nf4", "nf4 single", "16 bits", "merged nf4"],
)
def test_the_size_is_known_to_the_byte(lora: Path, base: Path, tmp_path: Path, output_format: OutputFormat) -> None:
    from safetensors import safe_open

    from convert.write.model import write_model

    opened, checkpoint = BaseModel.open(base), Checkpoint.open(lora)
    plan = plan_model(opened, output_format, checkpoint)

    write_model(tmp_path, plan, opened, checkpoint, lambda step, done, total: None)

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert written == plan.weight_bytes


def test_another_shape_lists_every_kind_of_module_with_its_number(lora: Path, tmp_path: Path, out: Path) -> None:
    wider = parts.save_base(tmp_path / "wider", tied=True, hidden=96)

    with pytest.raises(BaseMismatch) as caught:
        run(lora, wider, out)

    message = str(caught.value)
    more = [int(count) for count in re.findall(r"the adapter is for .* \(the same in (\d+) more places\)", message)]
    assert (len(more), sum(more) + len(more)) == (4, 14)
    assert "64 → 64 features, the base has 96 → 96" in message
    assert "'acme/tiny-llama'" in message


def test_more_layers_than_the_base_has(base: Path, tmp_path: Path, out: Path) -> None:
    deeper = parts.save_base(tmp_path / "deeper", tied=True, layers=3)
    adapter = parts.mark_lora(parts.save_adapter(deeper, tmp_path / "adapter"))

    with pytest.raises(BaseMismatch, match=r"layers\.2\.mlp\.down_proj: the base has only 2 layers"):
        run(adapter, base, out)


def test_modules_of_another_architecture(lora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_weights(copied, lambda ts: {n.replace("model.layers", "transformer.h"): t for n, t in ts.items()})

    with pytest.raises(BaseMismatch, match="another architecture"):
        run(copied, base, out)


def test_a_tokenizer_with_tokens_beyond_the_base_is_refused(lora: Path, base: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.save_tokenizer(copied)
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 300, "content": "<|new|>"})
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))

    with pytest.raises(BaseMismatch, match=r"'<\|new\|>'.*resized vocabulary of 301, the base has 272"):
        require_compatible(Checkpoint.open(copied), BaseModel.open(base))


def test_added_tokens_that_the_base_has_rows_for_are_no_resized_vocabulary(
    lora: Path, base: Path, tmp_path: Path
) -> None:
    padded = parts.copy(base, tmp_path / "padded")
    tokenizer = json.loads((padded / "tokenizer.json").read_text())
    last = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    number = tokenizer["model"]["vocab"].pop(last)
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (padded / "tokenizer.json").write_text(json.dumps(tokenizer))
    copied = parts.copy(lora, tmp_path / "copy")
    tokenizer["added_tokens"].append({"id": number, "content": "<|im_end|>"})
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    (copied / "added_tokens.json").write_text(json.dumps({"<|im_end|>": number, "<s>": 0}))

    require_compatible(Checkpoint.open(copied), BaseModel.open(padded))


def test_a_tokenizer_that_numbers_tokens_otherwise_is_refused(lora: Path, base: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.save_tokenizer(copied)
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))

    with pytest.raises(BaseMismatch, match="gives 2 tokens other ids"):
        require_compatible(Checkpoint.open(copied), BaseModel.open(base))


def test_a_base_without_a_tokenizer_is_refused(lora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    (copied / "tokenizer.json").unlink()

    with pytest.raises(BaseUnreadable, match="has no tokenizer"):
        run(lora, copied, out)


def test_a_full_disk_is_noticed_before_writing(
    lora: Path, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))  # type: ignore[attr-defined]

    with pytest.raises(OutputUnwritable, match="GB free, the output needs"):
        run(lora, base, out)


def test_parents_of_the_destination_are_created(qlora: Path, base: Path, tmp_path: Path) -> None:
    run(qlora, base, tmp_path / "artifacts" / "of-today" / "tiny")

    assert (tmp_path / "artifacts" / "of-today" / "tiny" / "manifest.json").is_file()


def test_a_destination_below_a_file_is_reported(lora: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OutputUnwritable, match="can't be written to"):
        run(lora, base, tmp_path / "file" / "tiny")
