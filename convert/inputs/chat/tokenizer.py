"""The tokenizer and chat template that lie in a model directory, and where its answers stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from convert.base_model import CONFIG
from convert.errors import BaseUnreadable, TextUnreadable
from convert.formats import GENERATION_FILES
from convert.quality.text import Message, Row
from convert.tensors import read_json

# Some templates, Llama 3.2's among them, write today's date into every chat. A measurement must not depend on the
# day, so this is their today; its text is what those templates take for a day that is not told.
_TODAY = datetime(2024, 7, 26, tzinfo=UTC)
CHAT_SETTINGS: Mapping[str, str] = {"date_string": "26 Jul 2024"}


@dataclass(frozen=True)
class Tokenizer:
    """Turns rows into token ids and back, in the words of one model."""

    directory: Path
    _loaded: Any

    @classmethod
    def open(cls, directory: Path) -> Tokenizer:
        """Raises BaseUnreadable where there is none."""
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        except Exception as cause:  # the tokenizers library raises nothing narrower
            raise BaseUnreadable(
                f"The tokenizer can't be loaded ({cause}). Copy the base's tokenizer files again."
            ) from cause
        return cls(directory, loaded)

    @property
    def has_template(self) -> bool:
        return bool(self._loaded.chat_template)

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._loaded.all_special_ids)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: generation_config.json says it, else config.json, else the tokenizer."""
        files = [path for name in (*GENERATION_FILES, CONFIG) if (path := self.directory / name).is_file()]
        for path in files:
            named = read_json(path, BaseUnreadable).get("eos_token_id")
            ids = named if isinstance(named, list) else [named]
            if ids and all(type(one) is int for one in ids):
                return tuple(dict.fromkeys(ids))
        own = self._loaded.eos_token_id
        return () if own is None else (own,)

    def ids(self, row: Row) -> list[int]:
        """Of a text, with the special tokens the tokenizer puts around it; of a chat, as the template renders it."""
        if isinstance(row, str):
            return list(self._loaded(row)["input_ids"])
        if not self.has_template:
            return self.ids(_plain(row))
        return self._rendered_ids(self.render(row, prompt=False))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Of a chat, up to where the assistant's answer begins."""
        if not self.has_template:
            return self.ids(f"{_plain(messages)}\nassistant:")
        return self._rendered_ids(self.render(messages, prompt=True))

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """The template's text of a chat; `prompt`: with the opening of an answer. Raises TextUnreadable."""
        from jinja2 import TemplateError

        try:
            rendered: str = self._loaded.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=prompt,
                strftime_now=_TODAY.strftime,
                **CHAT_SETTINGS,
            )
        except TemplateError as cause:
            roles = ", ".join(message["role"] for message in messages)
            raise TextUnreadable(f"The model's chat template refuses a chat of {roles}: {cause}") from cause
        return rendered

    def text(self, ids: Sequence[int]) -> str:
        decoded: str = self._loaded.decode(ids, skip_special_tokens=True)
        return decoded

    def _rendered_ids(self, rendered: str) -> list[int]:
        # The template writes the special tokens itself.
        return list(self._loaded(rendered, add_special_tokens=False)["input_ids"])


def _plain(messages: Sequence[Message]) -> str:
    """A chat for a model without a chat template."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
