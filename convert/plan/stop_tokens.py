"""The stop tokens of a model, which include what its chat template ends an answer with, wherever an engine reads them:

generation_config.json   eos_token_id    vLLM, transformers
config.json              eos_token_id    readers that know no generation_config.json
tokenizer_config.json    eos_token       vLLM, llama.cpp
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.artifact.file_names import CONFIG, GENERATION_CONFIG, SPECIAL_TOKENS, TOKENIZER_CONFIG
from convert.artifact.json_files import read_json
from convert.artifact.scratch import scratch_directory
from convert.errors import BaseUnreadable
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.inputs.chat.answer_format import AnswerFormat
from convert.inputs.chat.tokenizer import Tokenizer
from convert.inputs.model_config import stop_ids
from convert.plan.side_files import SideFiles, json_content, side_files

_EOS = "eos_token"
_PLAIN_TEXT = "Which day is it?"


@dataclass(frozen=True)
class StopTokens:
    """`files`, `config`: the side files and config.json with every stop token. `notes`: sentences for the user."""

    files: SideFiles
    config: Mapping[str, Any]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, files: SideFiles, config: Mapping[str, Any]) -> StopTokens:
        """Stop tokens that the files name already are kept. Raises BaseUnreadable where the tokenizer is broken."""
        with _opened(files, config) as tokenizer:
            answer_format = AnswerFormat.of(tokenizer)
            named, eos_id, bos_id = tokenizer.stop_ids, tokenizer.eos_id, tokenizer.bos_id
            wanted = [token_id for token_id in (answer_format.end_id, eos_id, *named) if token_id is not None]
            tokens = {token_id: tokenizer.token(token_id) for token_id in wanted}
            renderings = _renderings(tokenizer, answer_format)
        changed = dict(files)
        if answer_format.end_id not in (None, eos_id):
            renamed = changed | _with_eos_token(files, tokens[answer_format.end_id])
            with _opened(renamed, config) as tokenizer:
                # Some templates and tokenizers write eos_token into every text: it must stay the one of training.
                changed = renamed if _renderings(tokenizer, AnswerFormat.of(tokenizer)) == renderings else changed
        generation = _document(files, GENERATION_CONFIG)
        if (with_ids := _with_ids(generation, list(tokens), bos_id)) != generation:
            changed[GENERATION_CONFIG] = json_content(with_ids)
        new = [f"{tokens[token_id]!r} ({token_id})" for token_id in tokens if token_id not in named]
        notes = [*answer_format.notes]
        if new:
            notes.append(
                f"{' and '.join(new)} ends an answer by the chat template or the tokenizer, and was no stop token in "
                f"the base's files: now it is one in {GENERATION_CONFIG} and {CONFIG}."
            )
        return cls(changed, _with_ids(config, list(tokens), bos_id), tuple(notes))


def shared_base_notes(base: BaseModel) -> tuple[str, ...]:
    """What an engine does wrong with a base that is served as it is. Raises BaseUnreadable for a broken tokenizer."""
    tokenizer = Tokenizer.open(base.root)
    answer_format = AnswerFormat.of(tokenizer)
    end_id = answer_format.end_id
    if end_id is None or end_id in (*tokenizer.stop_ids, tokenizer.eos_id):
        return answer_format.notes
    return (
        *answer_format.notes,
        f"{tokenizer.token(end_id)!r} ends an answer by the base's chat template, and is no stop token in "
        "its files, which are served as they are: convert with the base's original directory instead.",
    )


def open_tokenizer(checkpoint: Checkpoint, base: BaseModel) -> Tokenizer:
    """The tokenizer with the chat template that the fine-tune used. Raises BaseUnreadable where there is none."""
    with _opened(side_files(checkpoint, base), base.config) as tokenizer:
        return tokenizer


@contextmanager
def _opened(files: SideFiles, config: Mapping[str, Any]) -> Iterator[Tokenizer]:
    """The tokenizer as it will be in a directory of these files. Raises BaseUnreadable for a broken one."""
    with scratch_directory() as directory:
        for name, file in {**files, CONFIG: json_content(config)}.items():
            path = directory / name
            path.parent.mkdir(exist_ok=True)
            if isinstance(file, bytes):
                path.write_bytes(file)
            else:
                path.symlink_to(file.resolve())
        yield Tokenizer.open(directory, {name: file for name, file in files.items() if isinstance(file, Path)})


def _renderings(tokenizer: Tokenizer, answer_format: AnswerFormat) -> tuple[object, ...]:
    return answer_format.texts, tokenizer.ids(_PLAIN_TEXT)


def _with_eos_token(files: SideFiles, token: str) -> dict[str, bytes]:
    """The files that name the tokenizer's EOS, with another one."""
    documents = {name: _document(files, name) for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS)}
    return {name: json_content({**document, _EOS: token}) for name, document in documents.items() if document}


def _with_ids(document: Mapping[str, Any], wanted: list[int], bos_id: int | None) -> dict[str, Any]:
    """The document with these stop tokens, unchanged where it has the same ones in another order."""
    result = dict(document)
    known = document.get("eos_token_id")
    if wanted and set(stop_ids(known)) != set(wanted):
        result["eos_token_id"] = wanted if len(wanted) > 1 else wanted[0]
    if bos_id is not None:
        result["bos_token_id"] = bos_id
    return result


def _document(files: SideFiles, name: str) -> dict[str, Any]:
    """A side file's JSON object; empty where there is no such file."""
    file = files.get(name, b"{}")
    if isinstance(file, Path):
        return read_json(file, BaseUnreadable)
    document: dict[str, Any] = json.loads(file)
    return document
