"""The tokenizer and the chat template of a model directory, and the tokens at which its answers stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from convert.errors import BaseUnreadable, TextUnreadable
from convert.inputs.chat.token_settings import stated_stop_ids, token_id

Message = dict[str, str]
Row = str | list[Message]

NO_SOURCES: Mapping[str, Path] = {}
_MAX_CAUSE = 400

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
    def open(cls, directory: Path, sources: Mapping[str, Path] = NO_SOURCES) -> Tokenizer:
        """Load the tokenizer of a model directory. Raises BaseUnreadable where there is none, or a broken one.

        `sources`: the paths by which messages name the files; without an entry that in the directory.
        """
        from transformers import AutoTokenizer

        stop_ids = stated_stop_ids(directory, sources)
        with _reported(directory, sources):
            loaded = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
            loaded("a text")["input_ids"]  # some settings are used only now
        return cls(stop_ids or token_id(loaded.eos_token_id), loaded)

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
        return next(iter(token_id(self._loaded.eos_token_id)), None)

    @property
    def bos_id(self) -> int | None:
        return next(iter(token_id(self._loaded.bos_token_id)), None)

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


@contextmanager
def _reported(directory: Path, sources: Mapping[str, Path]) -> Iterator[None]:
    """Raises BaseUnreadable where the libraries can't work with the files: they raise errors of every kind."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as cause:  # a panic of the tokenizers library is no Exception
        files = {path.parent for name, path in sources.items() if name.startswith("tokenizer")} or {directory}
        raise BaseUnreadable(
            f"The tokenizer of {' and '.join(sorted(map(str, files)))} can't be loaded: {_words(cause)}. Copy the "
            "tokenizer files of the base again (tokenizer.json, tokenizer_config.json)."
        ) from cause


def _words(cause: BaseException) -> str:
    text = " ".join(str(cause).split())
    return text if len(text) <= _MAX_CAUSE else f"{text[:_MAX_CAUSE]}…"


def _plain(messages: Sequence[Message]) -> str:
    """The text of a chat, for a model without a chat template."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
