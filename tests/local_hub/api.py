"""The Hub's HTTP API as `HubServer` answers it: one function for each address."""

import base64
import contextlib
import json
import re
import socket
import struct
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from local_hub.repos import (
    LFS_SUFFIXES,
    MAIN,
    Blob,
    Commit,
    HubError,
    Repo,
    front_matter,
    is_lfs,
    plural,
    repo_not_found,
)


class Handler(BaseHTTPRequestHandler):
    """One connection; `hub` is the `HubServer`."""

    hub = None
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # ---- plumbing ----

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.commit: Commit | None = None
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
        try:
            if self.command == "PUT" and url.path.startswith("/lfs/"):
                return self._receive_lfs(url.path.removeprefix("/lfs/"))
            if url.path.startswith("/cdn/"):
                return self._send_blob(self.hub.blob(url.path.removeprefix("/cdn/"), lfs=True), {})
            self.body = self._read_body()
            with self.hub.lock:
                for method, pattern, function in ROUTES:
                    match = re.fullmatch(pattern, url.path)
                    if match and self.command in method:
                        groups = {name: unquote(value or "") for name, value in match.groupdict().items()}
                        answer = function(self, **groups)
                        break
                else:
                    raise HubError(404, None, f"no such address: {self.command} {url.path}")
            if isinstance(answer, Blob):
                self._send_blob(answer, {"X-Repo-Commit": self.commit.sha})
            elif answer is not None:
                self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        except HubError as error:
            headers = {"X-Error-Message": error.message, "Content-Type": "application/json"}
            if error.code:
                headers["X-Error-Code"] = error.code
            if self.commit is not None:
                headers["X-Repo-Commit"] = self.commit.sha
            self._send(error.status, json.dumps({"error": error.message}).encode(), headers)
        except (TimeoutError, ConnectionError):
            self.close_connection = True

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self) -> dict:
        if self.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded"):
            form = parse_qs(self.body.decode())
            return {"paths": form.get("paths", []), "expand": form.get("expand", ["false"])[-1].lower() == "true"}
        return json.loads(self.body or b"{}")

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_blob(self, blob: Blob, headers: dict[str, str]) -> None:
        """A file, or the part of it that `Range` asks for."""
        headers = {**headers, "ETag": f'"{blob.lfs or blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.lfs and not self.path.startswith("/cdn/"):
            # as the Hub does: LFS files come from another origin, which never sees the token
            headers |= {"X-Linked-Etag": f'"{blob.lfs}"', "X-Linked-Size": str(blob.size)}
            headers["Location"] = f"http://localhost:{self.hub.port}/cdn/{blob.lfs}"
            return self._send(302, b"", headers)
        content, status = blob.path.read_bytes(), 200
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(match[1]) if match[1] else max(0, blob.size - int(match[2]))
            last = min(int(match[2]), blob.size - 1) if match[1] and match[2] else blob.size - 1
            if first >= blob.size:
                return self._send(416, b"", {"Content-Range": f"bytes */{blob.size}"})
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
        limit, reset = self._cut("download", len(content)) if self.command == "GET" else (None, False)
        if limit is None:
            return self._send(status, content, headers)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:limit])
        self._break(reset)

    def _receive_lfs(self, digest: str) -> None:
        size = int(self.headers.get("Content-Length", 0))
        limit, reset = self._cut("upload", size)
        if limit is not None:
            self.rfile.read(limit)
            return self._break(reset)
        if self.hub.keep(self._read_body()) != digest:
            raise HubError(400, None, "the content is not what its SHA-256 says")
        self._send(200, b"", {"ETag": f'"{digest}"'})

    def _cut(self, direction: str, size: int) -> tuple[int | None, bool]:
        """(after how many bytes this transfer breaks, if it does; whether by a reset)."""
        with self.hub.lock:
            for cut in self.hub.cuts.get(direction, ()):
                limit, times, larger_than, reset = cut
                if times > 0 and size > larger_than:
                    cut[1] -= 1
                    return limit, reset
        return None, False

    def _break(self, reset: bool) -> None:
        """End the connection, whatever was promised."""
        self.wfile.flush()
        self.close_connection = True
        if reset:
            with contextlib.suppress(OSError):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    # ---- who asks ----

    def _user(self) -> tuple[str, str] | None:
        """(name, role) behind the token, if there is one."""
        header = self.headers.get("Authorization")
        if not header:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return user

    def _find(self, kind: str, repo_id: str, write: bool = False, content: bool = False) -> Repo:
        """The repository, if it exists for who asks. `content`: its files are wanted; `write`: it is to be changed."""
        user, repo = self._user(), self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and (user is None or user[0] != repo.owner)):
            # the Hub does not tell strangers apart from what does not exist
            raise repo_not_found() if user else HubError(401, "RepoNotFound", "Invalid username or password.")
        if content and repo.gated and (user is None or user[0] != repo.owner):
            raise HubError(403 if user else 401, "GatedRepo", f"Access to {kind[:-1]} {repo_id} is restricted.")
        if write:
            self._check_writer(repo.owner)
        return repo

    def _check_writer(self, owner: str) -> None:
        user = self._user()
        if user is None:
            raise HubError(401, None, "Invalid username or password.")
        if user[0] != owner or user[1] != "write":
            raise HubError(403, None, f"You don't have the rights to write in the namespace {owner}")

    # ---- the API ----

    def whoami(self):
        user = self._user()
        if user is None:
            raise HubError(401, None, "Invalid username or password.")
        access = {"displayName": "a token", "role": user[1]}
        return {
            "type": "user",
            "id": user[0],
            "name": user[0],
            "fullname": user[0],
            "email": None,
            "isPro": False,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": access},
        }

    def create_repo(self):
        wanted = self._json()
        user = self._user()
        if user is None:
            raise HubError(401, None, "Invalid username or password.")
        owner = wanted.get("organization") or user[0]
        kind, repo_id = plural(wanted.get("type") or "model"), f"{owner}/{wanted['name']}"
        self._check_writer(owner)
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            body = {"error": "You already created this repo", "url": url}
            return self._send(409, json.dumps(body).encode(), {"X-Error-Message": body["error"]})
        if kind == "spaces" and not wanted.get("sdk"):
            raise HubError(400, None, "a Space needs an sdk")
        repo = Repo(kind, repo_id, sdk=wanted.get("sdk"))
        repo.private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES))
        files = {".gitattributes": self.hub.store(attributes.encode(), ".gitattributes")}
        self.hub.commit(repo, f"refs/heads/{MAIN}", None, "initial commit", user[0], files)
        self.hub.repos[kind, repo_id] = repo
        return {"url": url, "name": repo_id, "id": repo_id}

    def delete_repo(self):
        wanted = self._json()
        owner = wanted.get("organization") or (self._user() or ("", ""))[0]
        kind, repo_id = plural(wanted.get("type") or "model"), f"{owner}/{wanted['name']}"
        self._find(kind, repo_id, write=True)
        del self.hub.repos[kind, repo_id]
        return {}

    def repo_info(self, kind: str, repo_id: str, revision: str = ""):
        repo = self._find(kind, repo_id)
        commit = repo.resolve(revision or MAIN)
        card = {}
        if "README.md" in commit.tree:
            with contextlib.suppress(ValueError):
                card = front_matter(commit.tree["README.md"].path.read_text(encoding="utf-8"))
        siblings = [{"rfilename": path} for path in sorted(commit.tree)]
        if self.query.get("blobs"):
            for entry, (_, blob) in zip(siblings, sorted(commit.tree.items()), strict=True):
                entry |= {"size": blob.size, "blobId": blob.oid}
                if blob.lfs:
                    entry["lfs"] = {"sha256": blob.lfs, "size": blob.size, "pointerSize": 130}
        info = {
            "id": repo_id,
            "author": repo.owner,
            "sha": commit.sha,
            "createdAt": min(commit.date for commit in repo.commits.values()),
            "lastModified": commit.date,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [*card.get("tags", []), *([card["library_name"]] if "library_name" in card else [])],
            "cardData": card,
            "siblings": siblings,
        }
        if kind == "models":
            info |= {"modelId": repo_id, "pipeline_tag": card.get("pipeline_tag")}
            info |= {"library_name": card.get("library_name"), "config": self._model_config(commit)}
        if kind == "spaces":
            info |= {"sdk": repo.sdk or card.get("sdk"), "runtime": {"stage": "RUNNING", "hardware": {}}}
        return info

    def _model_config(self, commit: Commit) -> dict:
        blob = commit.tree.get("config.json")
        return json.loads(blob.path.read_bytes()) if blob else {}

    def tree(self, kind: str, repo_id: str, revision: str, path: str = ""):
        commit = self._find(kind, repo_id).resolve(revision)
        self.commit = commit
        prefix = f"{path.strip('/')}/" if path.strip("/") else ""
        inside = {name: blob for name, blob in commit.tree.items() if name.startswith(prefix)}
        if prefix and not inside:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision!r}")
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        entries = {}
        for name, blob in sorted(inside.items()):
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folder = prefix + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            if recursive or len(parts) == 1:
                entries[name] = _entry(name, blob, commit)
        return list(entries.values())

    def paths_info(self, kind: str, repo_id: str, revision: str):
        commit = self._find(kind, repo_id).resolve(revision)
        found = []
        for path in self._json()["paths"]:
            path = path.strip("/")
            if path in commit.tree:
                found.append(_entry(path, commit.tree[path], commit))
            elif any(name.startswith(f"{path}/") for name in commit.tree):
                found.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": path})
        return found

    def refs(self, kind: str, repo_id: str):
        repo = self._find(kind, repo_id)
        listed = {"branches": repo.named("refs/heads/"), "tags": repo.named("refs/tags/"), "converts": []}
        if self.query.get("include_prs"):
            listed["pullRequests"] = repo.named("refs/pr/")
        return listed

    def history(self, kind: str, repo_id: str, revision: str):
        self._find(kind, repo_id)
        return [
            {"id": c.sha, "title": c.title, "message": "", "date": c.date, "authors": [{"user": c.user}]}
            for c in self.hub.commits(kind, repo_id, revision)
        ]

    def auth_check(self, kind: str, repo_id: str):
        self._find(kind, repo_id, content=True)
        return {}

    def preupload(self, kind: str, repo_id: str, revision: str):
        pull_request = self.query.get("create_pr") == "1"
        repo = self._find(kind, repo_id, write=not pull_request)
        if pull_request and self._user() is None:
            raise HubError(401, None, "Invalid username or password.")
        commit = repo.resolve(revision)
        answer = []
        for file in self._json()["files"]:
            lfs = is_lfs(file["path"], base64.b64decode(file["sample"]), file["size"])
            there = commit.tree.get(file["path"])
            oid = there and (there.lfs or there.oid)
            mode = "lfs" if lfs else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def lfs_batch(self, repo_id: str, kind: str = ""):
        self._find(kind.strip("/") or "models", repo_id)
        if self._user() is None:
            raise HubError(401, None, "Invalid username or password.")
        objects = []
        for wanted in self._json()["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if not (self.hub.blobs / wanted["oid"]).exists():
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.url}/api/lfs-verify", "header": {}},
                }
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def lfs_verify(self):
        wanted = self._json()
        path = self.hub.blobs / wanted["oid"]
        if not path.exists() or path.stat().st_size != wanted["size"]:
            raise HubError(400, None, f"{wanted['oid']} did not arrive")
        return {}

    def commit_files(self, kind: str, repo_id: str, revision: str):
        pull_request = self.query.get("create_pr") == "1"
        repo = self._find(kind, repo_id, write=not pull_request)
        user = self._user()
        if user is None or user[1] != "write":
            raise HubError(403, None, "this token may not write")
        ref = next((ref for ref in (f"refs/heads/{revision}", revision) if ref in repo.refs), None)
        if ref is None or ref.startswith("refs/tags/"):
            raise HubError(404, "RevisionNotFound", f"{revision} is no branch")
        head = repo.commits[repo.refs[ref]]
        header, tree = {}, dict(head.tree)
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                header = value
            elif key == "file":
                content = base64.b64decode(value["content"])
                if is_lfs(value["path"], content[:512], len(content)):
                    raise HubError(400, None, f"{value['path']} must be uploaded by LFS")
                tree[value["path"]] = self.hub.store(content, value["path"])
            elif key == "lfsFile":
                if not (self.hub.blobs / value["oid"]).exists():
                    raise HubError(400, None, f"{value['path']}: its content was not uploaded")
                tree[value["path"]] = self.hub.blob(value["oid"], lfs=True)
            elif key == "deletedFile":
                if tree.pop(value["path"], None) is None:
                    raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
            elif key == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                tree = {path: blob for path, blob in tree.items() if not path.startswith(folder)}
        parent = header.get("parentCommit")
        if parent and not pull_request and not head.sha.startswith(parent):
            raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        target = f"refs/pr/{number}" if pull_request else ref
        commit = self.hub.commit(repo, target, head, header["summary"], user[0], tree)
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        discussion = f"{url}/discussions/{number}" if pull_request else None
        return {
            "success": True,
            "commitOid": commit.sha,
            "commitUrl": f"{url}/commit/{commit.sha}",
            "pullRequestUrl": discussion,
            "hookOutput": "",
        }

    def branch(self, kind: str, repo_id: str, name: str):
        return self._new_ref(self._find(kind, repo_id, write=True), f"refs/heads/{name}", MAIN, "startingPoint")

    def tag(self, kind: str, repo_id: str, revision: str):
        repo = self._find(kind, repo_id, write=True)
        if self.command == "DELETE":
            return self._new_ref(repo, f"refs/tags/{revision}", MAIN, "")
        return self._new_ref(repo, f"refs/tags/{self._json()['tag']}", revision, "")

    def _new_ref(self, repo: Repo, ref: str, revision: str, start: str):
        if self.command == "DELETE":
            if repo.refs.pop(ref, None) is None:
                raise HubError(404, "RevisionNotFound", f"{ref} does not exist")
            return {}
        if ref in repo.refs:
            raise HubError(409, None, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.resolve(self._json().get(start) or revision).sha
        return {}

    def resolve_file(self, repo_id: str, revision: str, path: str, kind: str = ""):
        repo = self._find(kind.strip("/") or "models", repo_id, content=True)
        self.commit = repo.resolve(revision)
        if path not in self.commit.tree:
            raise HubError(404, "EntryNotFound", "Entry not found")
        return self.commit.tree[path]

    def validate_yaml(self):
        wanted, errors = self._json(), []
        try:
            data = front_matter(wanted["content"])
        except ValueError as error:
            return {"errors": [{"message": str(error)}], "warnings": []}
        for key in ("license", "pipeline_tag", "library_name"):
            if key in data and not isinstance(data[key], str):
                errors.append({"message": f'"{key}" must be a string'})
        for key in ("tags", "datasets"):
            if key in data and not (isinstance(data[key], list) and all(isinstance(v, str) for v in data[key])):
                errors.append({"message": f'"{key}" must be a list of strings'})
        if data.get("license") == "other" and not data.get("license_name"):
            errors.append({"message": '"license_name" is needed with "license: other"'})
        for index in data.get("model-index", []):
            for result in index["results"]:
                complete = {"task", "dataset", "metrics"} <= result.keys() and result["dataset"].get("name")
                if not complete or any(not isinstance(m.get("value"), (int, float)) for m in result["metrics"]):
                    errors.append({"message": '"model-index" is incomplete'})
        return {"errors": errors, "warnings": []}


def _entry(path: str, blob: Blob, commit: Commit) -> dict:
    """A file of a listing."""
    entry = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.lfs, "size": blob.size, "pointerSize": 130}
    entry["lastCommit"] = {"id": commit.sha, "title": commit.title, "date": commit.date}
    return entry


_REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
_REV = r"(?P<revision>refs/pr/\d+|[^/]+)"
_PLAIN = r"/(?P<kind>datasets/|spaces/)?(?P<repo_id>[^/]+/[^/]+)"
ROUTES = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create_repo),
    (("DELETE",), "/api/repos/delete", Handler.delete_repo),
    (("POST",), "/api/validate-yaml", Handler.validate_yaml),
    (("POST",), "/api/lfs-verify", Handler.lfs_verify),
    (("POST",), _PLAIN + r"\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("GET",), _REPO, Handler.repo_info),
    (("GET",), _REPO + "/revision/" + _REV, Handler.repo_info),
    (("GET",), _REPO + "/tree/" + _REV + "(?P<path>/.*)?", Handler.tree),
    (("POST",), _REPO + "/paths-info/" + _REV, Handler.paths_info),
    (("GET",), _REPO + "/refs", Handler.refs),
    (("GET",), _REPO + "/auth-check", Handler.auth_check),
    (("GET",), _REPO + "/commits/" + _REV, Handler.history),
    (("POST",), _REPO + "/preupload/" + _REV, Handler.preupload),
    (("POST",), _REPO + "/commit/" + _REV, Handler.commit_files),
    (("POST", "DELETE"), _REPO + "/branch/(?P<name>.+)", Handler.branch),
    (("POST", "DELETE"), _REPO + "/tag/" + _REV, Handler.tag),
    (("GET", "HEAD"), _PLAIN + "/resolve/" + _REV + "/(?P<path>.+)", Handler.resolve_file),
]
