"""The tokenizer and the chat template of a model directory, and the tokens at which its answers stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from convert.artifact.file_names import TOKENIZER_FILES
from convert.artifact.small_files import require_small
from convert.errors import BaseUnreadable, TextUnreadable
from convert.inputs.chat.token_settings import stated_stop_ids, token_id
from convert.inputs.limits import TimeLimitExceeded, memory_limit, time_limit

Message = dict[str, str]
Row = str | list[Message]

NO_SOURCES: Mapping[str, Path] = {}
_MAX_CAUSE = 400
_NOT_OF_THE_FILES = (KeyboardInterrupt, SystemExit, MemoryError)

# A template is a program of the checkpoint's author. A large one takes milliseconds, and adds some kB to a chat.
_MAX_RENDER_S = 10.0
_MAX_RENDER_BYTES = 1 << 30
_MAX_ADDED = 1 << 20
_MAX_TIMES = 4

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
        """Load the tokenizer of a model directory. Raises BaseUnreadable where there is none, a broken one, or a file
        that is too large.

        `sources`: the paths by which messages name the files; without an entry that in the directory.
        """
        from transformers import AutoTokenizer

        for name in TOKENIZER_FILES:
            if (path := directory / name).is_file():
                require_small(sources.get(name, path), BaseUnreadable)
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
            return self._split(row)
        if not self.has_template:
            return self.ids(_plain(row))
        return self.rendered_ids(self.render(row, prompt=False))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, up to where the assistant's answer begins."""
        if not self.has_template:
            return self.ids(f"{_plain(messages)}\nassistant:")
        return self.rendered_ids(self.render(messages, prompt=True))

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """The template's text of a chat; `prompt`: with the opening of an answer.

        Raises TextUnreadable where the template refuses the chat, BaseUnreadable where it would hold up a server.
        """
        roles = ", ".join(message["role"] for message in messages)
        try:
            with time_limit(_MAX_RENDER_S), memory_limit(_MAX_RENDER_BYTES):
                rendered: str = self._loaded.apply_chat_template(
                    list(messages),
                    tokenize=False,
                    add_generation_prompt=prompt,
                    strftime_now=_TODAY.strftime,
                    **CHAT_SETTINGS,
                )
        except TimeLimitExceeded as limit:
            raise _unusable_template(roles, str(limit)) from limit
        except MemoryError as cause:
            raise _unusable_template(roles, f"more than {_MAX_RENDER_BYTES >> 20} MiB of memory") from cause
        except Exception as cause:  # a template is a program, and can fail with any error
            raise TextUnreadable(f"The model's chat template refuses a chat of {roles}: {cause}") from cause
        if len(rendered) > _MAX_ADDED * len(messages) + _MAX_TIMES * sum(len(each["content"]) for each in messages):
            raise _unusable_template(roles, f"{len(rendered)} characters")
        return rendered

    def text(self, ids: Sequence[int]) -> str:
        with _reported_words():
            decoded: str = self._loaded.decode(ids, skip_special_tokens=True)
        return decoded

    def rendered_ids(self, rendered: str) -> list[int]:
        """Token ids of a text that a template rendered, which has its special tokens already."""
        return self._split(rendered, add_special_tokens=False)

    def _split(self, text: str, **options: bool) -> list[int]:
        with _reported_words():
            return list(self._loaded(text, **options)["input_ids"])


@contextmanager
def _reported(directory: Path, sources: Mapping[str, Path]) -> Iterator[None]:
    """Raises BaseUnreadable where the libraries can't work with the files: they raise errors of every kind."""
    try:
        yield
    except _NOT_OF_THE_FILES:
        raise
    except BaseException as cause:  # a panic of the tokenizers library is no Exception
        files = {path.parent for name, path in sources.items() if name.startswith("tokenizer")} or {directory}
        raise BaseUnreadable(
            f"The tokenizer of {' and '.join(sorted(map(str, files)))} can't be loaded: {_words(cause)}. Copy the "
            "tokenizer files of the base again (tokenizer.json, tokenizer_config.json)."
        ) from cause


@contextmanager
def _reported_words() -> Iterator[None]:
    """Raises BaseUnreadable where a tokenizer that was loaded fails at a text, by a pattern that is too slow."""
    try:
        yield
    except _NOT_OF_THE_FILES:
        raise
    except BaseException as cause:
        raise BaseUnreadable(
            f"The tokenizer fails at a text: {_words(cause)}. Copy tokenizer.json of the base again."
        ) from cause


def _unusable_template(roles: str, needs: str) -> BaseUnreadable:
    return BaseUnreadable(
        f"The model's chat template takes {needs} for a chat of {roles}, which would hold up a server at every "
        "request. Copy the chat template of the base model into the checkpoint, or correct it."
    )


def _words(cause: BaseException) -> str:
    text = " ".join(str(cause).split())
    return text if len(text) <= _MAX_CAUSE else f"{text[:_MAX_CAUSE]}…"


def _plain(messages: Sequence[Message]) -> str:
    """The text of a chat, for a model without a chat template."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
