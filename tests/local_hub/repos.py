"""What the local Hub keeps of a repository."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml


KINDS = ("models", "datasets", "spaces")
MAIN = "main"
# what the Hub's default .gitattributes give to LFS, as far as it occurs here
LFS_SUFFIXES = {".safetensors", ".bin", ".pt", ".pkl", ".parquet", ".arrow", ".model", ".zip", ".gz", ".npy", ".npz"}
LARGEST_REGULAR = 10 * 2**20


class HubError(Exception):
    """What the Hub refuses: status, `X-Error-Code` and `X-Error-Message`."""

    def __init__(self, status: int, code: str | None, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def repo_not_found() -> HubError:
    return HubError(404, "RepoNotFound", "Repository not found")


@dataclass
class Blob:
    """A file's content: its git object id, and its SHA-256 when it is in LFS."""

    oid: str
    size: int
    path: Path
    lfs: str | None = None


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    user: str
    date: str
    tree: dict[str, Blob]


@dataclass
class Repo:
    kind: str
    repo_id: str
    private: bool = False
    gated: bool = False
    sdk: str | None = None
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.repo_id.split("/")[0]

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request or sha (also shortened)."""
        for prefix in ("refs/heads/", "refs/tags/", ""):
            if prefix + revision in self.refs:
                return self.commits[self.refs[prefix + revision]]
        found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        if len(found) != 1:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[found[0]]

    def named(self, prefix: str) -> list[dict]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
            for ref, sha in self.refs.items()
            if ref.startswith(prefix)
        ]


def plural(kind: str) -> str:
    kind = kind if kind.endswith("s") else f"{kind}s"
    assert kind in KINDS, kind
    return kind


def is_lfs(name: str, sample: bytes, size: int) -> bool:
    """Whether the Hub asks for LFS: by suffix, by size, or because it is no text."""
    if Path(name).suffix in LFS_SUFFIXES or size > LARGEST_REGULAR:
        return True
    try:
        sample.decode("utf-8")
    except UnicodeDecodeError as error:
        # a sample may end within a character
        return error.start < len(sample) - 3
    return b"\0" in sample


def front_matter(text: str) -> dict:
    """The metadata of a card; raises ValueError for what is none."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", text, re.DOTALL)
    if not match:
        return {}
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError("metadata must be a mapping")
    return data
