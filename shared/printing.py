"""Text from outside (answers, rows, file names) is printed through here: a terminal obeys control characters."""

import unicodedata


# line ends and tabs are text; of the rest, Cc are control characters and Cf invisible ones, such as reversed writing
_KEPT = frozenset("\n\t")
# joiners that emoji and several scripts need
_JOINERS = frozenset("\u200c\u200d\u2060")


def printable(text: str) -> str:
    r"""`text` with control characters and invisible directions written out (`\x1b`, `\u202e`); `\r\n` becomes `\n`."""
    return "".join(
        character
        if character in _KEPT or character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf")
        else character.encode("unicode_escape").decode("ascii")
        for character in text.replace("\r\n", "\n")
    )
