"""golden.json: prompts with the answers that a server of an artifact must give."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from convert.artifact.manifest import ManifestPart

# Some chat templates, such as that of Llama 3.2, write today's date into every chat, and golden answers must not depend
# on the day. So the templates get these arguments, from `convert` and from a server that is compared.
GOLDEN_CHAT_ARGUMENTS: Mapping[str, str] = {"date_string": "26 Jul 2024"}


class GoldenPrompt(ManifestPart):
    """Tokens, and the log-probability of each token given the tokens before it."""

    token_ids: tuple[int, ...] = Field(min_length=2)
    reference: tuple[float, ...] = Field(
        description="Log-probability of every token but the first under the function as trained."
    )
    result: tuple[float, ...] = Field(description="The same, computed from the written files in float32.")
    base: tuple[float, ...] | None = Field(
        default=None, description="The same for the base alone; only where the adapter stays separate."
    )


class GoldenChat(ManifestPart):
    """A conversation, and its text by the chat template."""

    messages: tuple[dict[str, str], ...]
    rendered: str


class GoldenCanary(ManifestPart):
    """A question, and a text that the answer must contain, in upper or lower case."""

    messages: tuple[dict[str, str], ...]
    expect: str


class Golden(ManifestPart):
    """The content of golden.json."""

    prompts: tuple[GoldenPrompt, ...]
    chats: tuple[GoldenChat, ...]
    canaries: tuple[GoldenCanary, ...]
    stop_token_ids: tuple[int, ...]
