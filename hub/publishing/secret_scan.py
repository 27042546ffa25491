"""
Secrets in what is about to leave: detect-secrets' detectors, and our own patterns for what they do not know.

Entropy alone is no finding here: hashes, revisions and names of runs are all over a model's records.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, BinaryIO

from huggingface_hub import get_token


TOKENS = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a Google key": r"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a wandb key": r"(?i)\bwandb_api_key\W{1,4}[0-9a-f]{40}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
# what each of them begins with: looked for first, as reading bytes by patterns takes ten times as long
BEGINNINGS = (
    "hf_", "api_org_", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "AKIA", "AIza", "xox",
    "wandb_api_key", "WANDB_API_KEY", "-----BEGIN ",
)  # fmt: skip
CHUNK, OVERLAP = 16 * 2**20, 4096
DETECTORS = (
    "AWSKeyDetector", "AzureStorageKeyDetector", "BasicAuthDetector", "CloudantDetector", "DiscordBotTokenDetector",
    "GitHubTokenDetector", "GitLabTokenDetector", "IbmCloudIamDetector", "JwtTokenDetector", "KeywordDetector",
    "MailchimpDetector", "NpmDetector", "OpenAIDetector", "PrivateKeyDetector", "PypiTokenDetector",
    "SendGridDetector", "SlackDetector", "SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector",
    "TwilioKeyDetector",
)  # fmt: skip


def find_secrets(text: str) -> list[str]:
    """Secrets in a text, shown by their beginning alone; JSON is also read without its escapes."""
    # of extra `train`; `demo` and `space` import this file and send nothing
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import transient_settings

    found: dict[str, tuple[str, int]] = {}
    for kind, pattern in TOKENS.items():
        for match in re.finditer(pattern, text):
            found.setdefault(match[0], (kind, text.count("\n", 0, match.start()) + 1))
    own = get_token()
    if own and own in text:
        found.setdefault(own, ("your own token", text.count("\n", 0, text.index(own)) + 1))
    settings = {"plugins_used": [{"name": name} for name in DETECTORS], "filters_used": []}
    with transient_settings(settings):
        for number, line in enumerate(text.splitlines(), start=1):
            for secret in scan_line(line):
                value = secret.secret_value or ""
                if value and not any(value in other or other in value for other in found):
                    found[value] = (f"what looks like a secret ({secret.type})", number)
    return [
        f"line {line} holds {kind} ({secret[:7]}…). Remove it, and withdraw it where it was issued."
        for secret, (kind, line) in found.items()
    ]


def find_tokens(file: BinaryIO) -> list[str]:
    """Tokens and keys in any file, as bytes in UTF-8 and UTF-16: a chunk at a time, at the speed of the disk."""
    own = get_token()
    # without zeros UTF-16 of either order is ASCII
    found: dict[str, str] = {}
    behind = b""
    while chunk := file.read(CHUNK):
        data = behind + chunk
        for seen in {data, data.replace(b"\0", b"")}:
            for kind, secret in _tokens(seen, own):
                found.setdefault(secret, kind)
        behind = data[-OVERLAP:]
    return [
        f"holds {kind} ({secret[:7]}…). Remove it, and withdraw it where it was issued."
        for secret, kind in found.items()
    ]


def _tokens(data: bytes, own: str | None) -> Iterable[tuple[str, str]]:
    if own and own.encode() in data:
        yield "your own token", own
    for beginning in BEGINNINGS:
        place = data.find(beginning.encode())
        while place >= 0:
            # one character before, for the word's boundary
            near = data[max(0, place - 1) : place + 400].decode("latin-1")
            for kind, pattern in TOKENS.items():
                if match := re.compile(pattern, re.ASCII).match(near, min(place, 1)):
                    yield kind, match[0]
            place = data.find(beginning.encode(), place + 1)


def unescaped(text: str) -> str | None:
    """The strings of a JSON text a line each, as a reader of the file sees them; `None` where it is no JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return "\n".join(strings_in(value))


def strings_in(value: Any, name: str = "") -> Iterable[str]:
    """Every text at any depth, bytes included, with the name of its field where it has one."""
    if isinstance(value, bytes):
        value = value.replace(b"\0", b"").decode("utf-8", "replace")
    if isinstance(value, str):
        yield f'"{name}": "{value}"' if name else value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings_in(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from strings_in(inner, name)
