"""How a chat template begins and ends an assistant's answer, known by rendering a conversation with the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from convert.errors import TextUnreadable
from convert.inputs.chat.tokenizer import Message, Tokenizer

_QUESTION: Message = {"role": "user", "content": "Which day is it?"}
_ANSWER: Message = {"role": "assistant", "content": "It is Monday"}


@dataclass(frozen=True)
class AnswerFormat:
    """`end_id`: the token that ends an answer; None where no single token does, or nothing can be rendered.

    `notes`: what a server will do wrong with this template, in sentences. `texts`: the rendered conversations.
    """

    end_id: int | None = None
    notes: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> AnswerFormat:
        """Render a question, alone and with its answer."""
        if not tokenizer.has_template:
            return cls()
        try:
            begun = tokenizer.render([_QUESTION], prompt=True)
            alone = tokenizer.render([_QUESTION], prompt=False)
            answered = tokenizer.render([_QUESTION, _ANSWER], prompt=False)
        except TextUnreadable as refusal:
            return cls(notes=(f"What ends an answer can't be derived from the chat template. {refusal}",))
        opening, answer, ending = answered.rpartition(_ANSWER["content"])
        if not answer:
            return cls(notes=("The chat template leaves out the assistant's answers.",))
        added = tokenizer.added_ids
        end_id = next((token_id for token_id in tokenizer.rendered_ids(ending) if token_id in added), None)
        notes = [*_notes_on_begin(opening, begun, alone)]
        if end_id is None and ending.strip():
            notes.append(_note_on_end(ending.strip(), tokenizer))
        return cls(end_id, tuple(notes), (begun, alone, answered))


def _notes_on_begin(opening: str, begun: str, alone: str) -> tuple[str, ...]:
    """Without a generation prompt the model itself has to write what stood before its answers in training."""
    missing = opening.removeprefix(begun).strip() if begun == alone and opening.startswith(begun) else ""
    if not missing:
        return ()
    return (
        f"The chat template ignores add_generation_prompt, so that a server does not write {missing!r} before an "
        "answer, as it was in training. Add it to the template.",
    )


def _note_on_end(words: str, tokenizer: Tokenizer) -> str:
    return (
        f"The chat template ends an answer with {words!r}, which the tokenizer splits into "
        f"{len(tokenizer.rendered_ids(words))} tokens, so that no engine stops there by itself. "
        "Give it as `stop` in each request."
    )
