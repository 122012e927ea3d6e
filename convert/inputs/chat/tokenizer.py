"""The tokenizer and the chat template of a model directory, and the tokens at which its answers stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from convert.artifact.file_names import GENERATION_CONFIG
from convert.errors import BaseUnreadable, TextUnreadable
from convert.inputs.model_config import CONFIG
from convert.safetensors_io.tensors import read_json

Message = dict[str, str]
Row = str | list[Message]

# Some templates, Llama 3.2's among them, write today's date into every chat. A measurement must not depend on the
# day, so every chat is rendered on this one. It is the day that those templates use where they are given none.
_TODAY = datetime(2024, 7, 26, tzinfo=UTC)
CHAT_SETTINGS: Mapping[str, str] = {"date_string": "26 Jul 2024"}


@dataclass(frozen=True)
class Tokenizer:
    """Turns rows into token ids and back, as one model does. The directory is read by `open` alone.

    `stop_ids`: the tokens that end an answer, by generation_config.json, else config.json, else the tokenizer.
    """

    stop_ids: tuple[int, ...]
    _loaded: Any

    @classmethod
    def open(cls, directory: Path) -> Tokenizer:
        """Load the tokenizer of a model directory. Raises BaseUnreadable where there is none, or a broken one."""
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        except Exception as cause:  # the tokenizers library raises nothing narrower
            raise BaseUnreadable(
                f"The tokenizer can't be loaded ({cause}). Copy the base's tokenizer files again."
            ) from cause
        return cls(_stop_ids(directory) or _distinct(loaded.eos_token_id), loaded)

    @property
    def has_template(self) -> bool:
        return bool(self._loaded.chat_template)

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._loaded.all_special_ids)

    @property
    def added_ids(self) -> frozenset[int]:
        """Ids of the tokens that no text is split into, but that stand for themselves: `<|im_end|>`, `</s>`."""
        return self.special_ids | frozenset(self._loaded.added_tokens_decoder)

    @property
    def eos_id(self) -> int | None:
        return next(iter(_distinct(self._loaded.eos_token_id)), None)

    @property
    def bos_id(self) -> int | None:
        return next(iter(_distinct(self._loaded.bos_token_id)), None)

    def token(self, token_id: int) -> str:
        return str(self._loaded.convert_ids_to_tokens(token_id))

    def ids(self, row: Row) -> list[int]:
        """Token ids of a text with the tokenizer's special tokens, or of a chat as the template renders it."""
        if isinstance(row, str):
            return list(self._loaded(row)["input_ids"])
        if not self.has_template:
            return self.ids(_plain(row))
        return self.rendered_ids(self.render(row, prompt=False))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, up to where the assistant's answer begins."""
        if not self.has_template:
            return self.ids(f"{_plain(messages)}\nassistant:")
        return self.rendered_ids(self.render(messages, prompt=True))

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """The template's text of a chat; `prompt`: with the opening of an answer. Raises TextUnreadable."""
        try:
            rendered: str = self._loaded.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=prompt,
                strftime_now=_TODAY.strftime,
                **CHAT_SETTINGS,
            )
        except Exception as cause:  # a template is a program, and can fail with any error
            roles = ", ".join(message["role"] for message in messages)
            raise TextUnreadable(f"The model's chat template refuses a chat of {roles}: {cause}") from cause
        return rendered

    def text(self, ids: Sequence[int]) -> str:
        decoded: str = self._loaded.decode(ids, skip_special_tokens=True)
        return decoded

    def rendered_ids(self, rendered: str) -> list[int]:
        """Token ids of a text that a template rendered, which has its special tokens already."""
        return list(self._loaded(rendered, add_special_tokens=False)["input_ids"])


def _stop_ids(directory: Path) -> tuple[int, ...]:
    files = [path for name in (GENERATION_CONFIG, CONFIG) if (path := directory / name).is_file()]
    stated = (_distinct(read_json(path, BaseUnreadable).get("eos_token_id")) for path in files)
    return next(filter(None, stated), ())


def _distinct(token_ids: object) -> tuple[int, ...]:
    """The ids in a setting that is an id, a list of ids, or something else."""
    listed = token_ids if isinstance(token_ids, list) else [token_ids]
    ids = [token_id for token_id in listed if type(token_id) is int]
    return tuple(dict.fromkeys(ids)) if len(ids) == len(listed) else ()


def _plain(messages: Sequence[Message]) -> str:
    """The text of a chat, for a model without a chat template."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
