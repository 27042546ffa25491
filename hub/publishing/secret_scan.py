"""
Secrets in what is about to leave: detect-secrets' detectors, and our own patterns for what they do not know.

Entropy alone is no finding here: hashes, revisions and names of runs are all over a model's records.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import get_token
from PIL import Image


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


def unescaped(text: str) -> str | None:
    """The strings of a JSON text a line each, as a reader of the file sees them; `None` where it is no JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return "\n".join(_strings(value))


def _strings(value, name: str = "") -> Iterable[str]:
    if isinstance(value, str):
        yield f'"{name}": "{value}"' if name else value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, name)


def texts_of_image(path: Path) -> str:
    """What an image file says besides its pixels: PNG's text, comments, EXIF, XMP."""
    try:
        with Image.open(path) as image:
            said = {str(key): value for key, value in image.info.items()}
            said |= {str(key): value for key, value in image.getexif().items()}
    except (OSError, ValueError, SyntaxError):
        return ""
    lines = (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in said.values())
    return "\n".join(lines)
