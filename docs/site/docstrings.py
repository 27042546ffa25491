"""Docstrings in transformers' way, as the site's generator reads them: names without brackets, types without marks."""

import re

import griffe


class TransformersStyle(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)


def plain(text: str) -> str:
    """`[`~module.Name`]` becomes `` `Name` ``; `name (`type`, *optional*):` loses backticks and stars."""
    text = re.sub(r"\[`~?(?:[\w.]+\.)?([\w.]+)`\]", r"`\1`", text)

    def unmarked(match: re.Match) -> str:
        return f"{match.group(1)} ({re.sub('[`*]', '', match.group(2))}):"

    return re.sub(r"^(\s+\w+) \((.*?)\):(?=\s|$)", unmarked, text, flags=re.MULTILINE)
