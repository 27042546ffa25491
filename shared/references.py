"""What users name: a folder here, or a repository on the Hub."""

import re


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str | None) -> bool:
    """Whether a name may be USER/NAME on the Hub, and no path."""
    return name is not None and _HUB_ID.fullmatch(name) is not None
