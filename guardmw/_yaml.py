"""YAML as policies are written in it: safe types, and no key twice."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice: the second would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        """A mapping of distinct keys."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ValueError(f"the key {twice!r} comes twice")
        return super().construct_mapping(node, deep)


def load(text: str) -> Any:  # noqa: ANN401 - any YAML value
    """The value of a text.

    Raises:
        ValueError: it is no YAML, or a mapping has a key twice.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def dump(settings: dict[str, Any]) -> str:
    """Settings in the order they come in."""
    return yaml.safe_dump(settings, sort_keys=False)
