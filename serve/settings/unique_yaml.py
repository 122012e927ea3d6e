"""Reads YAML in which no mapping has a key twice: the libraries take the last one, and lose what was there before."""

from __future__ import annotations

from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


def load_yaml(text: str) -> Any:
    """The document of YAML's plain types. Raises yaml.YAMLError, also where a mapping has a key twice."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    # Where a node is composed: when it is constructed, merge keys may have added those of another mapping.
    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"found the key {key.value!r} twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node
