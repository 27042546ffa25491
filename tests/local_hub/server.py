"""
A Hub for the tests: an HTTP server on this machine that speaks the part of the Hub's API the real clients use.

Models, data sets and Spaces with commits, branches, tags and pull requests; regular files and LFS; public, private and
gated repositories; tokens; connections that break in the middle of a file. The client runs in a process of its own,
because `huggingface_hub` reads its settings once: give it `HubServer.env()`.
"""

import hashlib
import json
import os
import threading
from datetime import UTC, datetime, timedelta
from http.server import ThreadingHTTPServer
from pathlib import Path

from local_hub.api import Handler
from local_hub.repos import MAIN, Blob, Commit, Repo, is_lfs, plural


class HubServer:
    """
    The server, running between `with HubServer(folder) as hub:` and its end.

    Attributes:
        url: its address, for `HF_ENDPOINT`.
        token: a token of the user `user`, who may write; `add_user` makes others.
        requests: `(method, path)` of every request so far.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        self.blobs = self.root / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.users: dict[str, tuple[str, str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.token = self.add_user("user")
        self.cuts: dict[str, list[list]] = {}
        self._clock = datetime(2024, 5, 29, tzinfo=UTC)

    def __enter__(self) -> "HubServer":
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    # ---- what a test says to it ----

    def env(self, token: str | None = None, home: str | os.PathLike | None = None, **more: str) -> dict[str, str]:
        """
        The environment of a client process: this one's without what concerns Hub, Python and transformers.

        Args:
            token: the client's; by default none.
            home: its `HF_HOME`, where its cache is; by default a fresh folder.
        """
        left_out = ("HF_", "HUGGING", "PYTHON", "TRANSFORMERS_", "COV_")
        environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(left_out)}
        if home is None:
            home = self.root / "homes" / str(len(list((self.root / "homes").glob("*"))))
            home.mkdir(parents=True)
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if token is not None:
            environment["HF_TOKEN"] = token
        return environment | more

    def add_user(self, name: str, role: str = "write") -> str:
        """A token of the user `name`; `role` is "write" or "read"."""
        # in two pieces, so that no scanner takes this line for a leaked secret
        token = "hf" + "_" + hashlib.sha256(f"{name} {role}".encode()).hexdigest()[:34]
        self.users[token] = (name, role)
        return token

    def add_repo(
        self, kind: str, repo_id: str, folder: str | os.PathLike | None = None, private: bool = False, gated=False
    ) -> Repo:
        """A repository with the files of a folder as its only commit. `kind`: "models", "datasets", "spaces"."""
        repo = Repo(plural(kind), repo_id, private=private, gated=gated)
        with self.lock:
            self.commit(repo, f"refs/heads/{MAIN}", None, "initial commit", repo.owner, self._tree(folder))
            self.repos[repo.kind, repo_id] = repo
        return repo

    def commit_folder(self, kind: str, repo_id: str, folder: str | os.PathLike, title: str = "a newer version") -> str:
        """Another commit to main, with exactly a folder's files; its sha."""
        repo = self.repos[plural(kind), repo_id]
        with self.lock:
            parent, tree = repo.resolve(MAIN), self._tree(folder)
            return self.commit(repo, f"refs/heads/{MAIN}", parent, title, repo.owner, tree).sha

    def _tree(self, folder: str | os.PathLike | None) -> dict[str, Blob]:
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file()) if folder is not None else []
        return {path.relative_to(folder).as_posix(): self.store(path.read_bytes(), path.name) for path in paths}

    def commits(self, kind: str, repo_id: str, revision: str = MAIN) -> list[Commit]:
        """The commits of a revision, the newest first."""
        repo = self.repos[plural(kind), repo_id]
        history, sha = [], repo.resolve(revision).sha
        while sha is not None:
            history.append(repo.commits[sha])
            sha = repo.commits[sha].parent
        return history

    def files(self, kind: str, repo_id: str, revision: str = MAIN) -> dict[str, bytes]:
        """The files of a revision."""
        tree = self.repos[plural(kind), repo_id].resolve(revision).tree
        return {path: blob.path.read_bytes() for path, blob in sorted(tree.items())}

    def cut_after(
        self,
        num_bytes: int | None,
        where: str = "both",
        times: int | None = None,
        larger_than: int | None = None,
        reset: bool = True,
    ) -> None:
        """
        Break connections once `num_bytes` of a file have passed. A second call says what happens after the first's
        `times` are used up; `None` ends it all.

        Args:
            where: "upload", "download" or "both".
            times: how many connections are broken; by default all.
            larger_than: smaller files pass; by default those of up to `num_bytes`.
            reset: the connection is reset; otherwise it ends as if that were all.
        """
        for direction in ("upload", "download"):
            if where not in (direction, "both"):
                continue
            if num_bytes is None:
                self.cuts.pop(direction, None)
            else:
                limit = num_bytes if larger_than is None else larger_than
                cut = [num_bytes, float("inf") if times is None else times, limit, reset]
                self.cuts.setdefault(direction, []).append(cut)

    def writes(self) -> list[tuple[str, str]]:
        """The requests that change something."""
        harmless = ("/api/validate-yaml", "/paths-info/")
        return [
            (method, path)
            for method, path in self.requests
            if method not in ("GET", "HEAD") and not any(part in path for part in harmless)
        ]

    # ---- storage ----

    def store(self, content: bytes, name: str) -> Blob:
        """Keep a file's content."""
        return self.blob(self.keep(content), is_lfs(name, content[:512], len(content)))

    def keep(self, content: bytes) -> str:
        """Store bytes under their SHA-256, whole or not at all."""
        digest = hashlib.sha256(content).hexdigest()
        path = self.blobs / digest
        if not path.exists():
            beside = path.with_name(f"{digest}.{threading.get_ident()}")
            beside.write_bytes(content)
            os.replace(beside, path)
        return digest

    def blob(self, digest: str, lfs: bool) -> Blob:
        path = self.blobs / digest
        size = path.stat().st_size
        content = path.read_bytes()
        if lfs:
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return Blob(oid, size, path, digest if lfs else None)

    def commit(self, repo: Repo, ref: str, parent: Commit | None, title: str, user: str, tree: dict) -> Commit:
        self._clock += timedelta(seconds=1)
        date = self._clock.strftime("%Y-%m-%dT%H:%M:%S.000Z")
        listing = [(path, blob.oid) for path, blob in sorted(tree.items())]
        seed = json.dumps([repo.kind, repo.repo_id, parent and parent.sha, title, date, listing])
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent and parent.sha, title, user, date, tree)
        repo.commits[commit.sha] = commit
        repo.refs[ref] = commit.sha
        return commit
