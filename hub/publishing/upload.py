"""One commit to the Hub, or none: models, data sets and Spaces, with errors that say what to do."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id


OFFLINE = "The Hub is switched off by HF_HUB_OFFLINE: unset it."


@dataclass
class Upload:
    """The result of an upload."""

    repo_id: str
    repo_type: str
    url: str  # of the commit, or of the pull request
    commit: str  # its sha
    changed: bool = True  # whether there was anything new
    pull_request: str | None = None  # its revision, "refs/pr/N"
    tag: str | None = None


def check_repo_id(repo_id: str) -> str:
    """
    A repository's id as the Hub takes it.

    Raises:
        ValueError: it is not USER/NAME.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be a repository's id: {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is no repository id: write USER/NAME or ORGANIZATION/NAME.")
    return repo_id


def check_signed_in(token: str | None = None) -> None:
    """
    Checks, without a request, that the Hub can be used.

    Raises:
        ValueError: the client is offline, or there is no token.
    """
    if constants.HF_HUB_OFFLINE:
        raise ValueError(OFFLINE)
    if (token or get_token()) is None:
        raise ValueError("The Hub needs to know who you are: run `hf auth login`, or set HF_TOKEN.")


def upload_checked_folder(
    folder: str | os.PathLike | Mapping[str, Path],
    repo_id: str,
    repo_type: str = "model",
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    message: str = "Upload",
    space_sdk: str | None = None,
    stale: Iterable[str] = (),
    shards: Iterable[tuple[str, Path]] = (),
    token: str | None = None,
) -> Upload:
    """
    Upload files that have been checked, as one commit.

    Nothing appears in the repository before the commit, which is the last step: an upload that breaks leaves a
    repository as it was (a new one: empty), and can be repeated, which sends only what did not arrive.

    Args:
        folder: a folder, all of whose files go, or path in the repository -> path here.
        repo_id: USER/NAME; created where it does not exist.
        repo_type: "model", "dataset" or "space".
        private: of a new repository; by default what the account's settings say. An existing public one is refused
            with `True`.
        revision: branch to commit to, created from main where it does not exist.
        create_pr: open a pull request instead.
        tag: give the commit this tag.
        message: of the commit.
        space_sdk: of a new Space.
        stale: patterns of files to remove from the repository where they are not among the uploaded.
        shards: more (path in the repository, path here), made one by one: each is sent before the next is asked for,
            and may then be removed.
        token: by default `HF_TOKEN` or the stored one.

    Raises:
        ValueError: the Hub refused or was not reached: what happened, and what to do.
    """
    check_repo_id(repo_id)
    if create_pr and (revision or tag):
        raise ValueError("A pull request goes to main and is tagged once merged: leave --revision and --tag out.")
    if isinstance(folder, Mapping):
        files = dict(folder)
    else:
        root = Path(folder)
        files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
    if not files:
        raise ValueError(f"{folder} holds no files.")
    check_signed_in(token)
    api = HfApi(token=token)
    with hub_errors(repo_id, repo_type):
        created = _open_repo(api, repo_id, repo_type, private, space_sdk, create_pr)
        refs = api.list_repo_refs(repo_id, repo_type=repo_type)
        if tag and tag in {ref.name for ref in refs.tags}:
            raise ValueError(f"{repo_id} has a tag {tag!r} already: choose another, tags stay where they are.")
        has_branch = revision is None or revision in {ref.name for ref in refs.branches}
        try:
            # a new branch starts as main is; it appears when all files have arrived
            start = revision if revision and has_branch else constants.DEFAULT_REVISION
            head = api.repo_info(repo_id, repo_type=repo_type, revision=start).sha
            there = api.list_repo_files(repo_id, repo_type=repo_type, revision=start)
            place = {"repo_type": repo_type, "revision": start, "create_pr": create_pr}
            operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
            api.preupload_lfs_files(repo_id, additions=operations, **place)
            for name, path in shards:
                operations.append(CommitOperationAdd(name, str(path)))
                api.preupload_lfs_files(repo_id, additions=operations[-1:], **place)
            sent = {operation.path_in_repo for operation in operations}
            old = [name for name in there if name not in sent and any(_is_stale(name, pattern) for pattern in stale)]
            if not has_branch:
                api.create_branch(repo_id, branch=revision, revision=head, repo_type=repo_type)
            commit = api.create_commit(
                repo_id,
                [*operations, *(CommitOperationDelete(name, is_folder=False) for name in old)],
                commit_message=message,
                repo_type=repo_type,
                revision=revision,
                create_pr=create_pr,
                parent_commit=None if create_pr else head,
            )
        except Exception as error:
            if created and not isinstance(error, ValueError):
                error.add_note(f"{repo_id} was created and holds nothing yet.")
            raise
        if tag:
            try:
                api.create_tag(repo_id, tag=tag, revision=commit.oid, repo_type=repo_type)
            except Exception as error:
                error.add_note(f"The commit {commit.oid} is there, without its tag.")
                raise
    return Upload(
        repo_id=repo_id,
        repo_type=repo_type,
        url=commit.pr_url or commit.commit_url,
        commit=commit.oid,
        changed=commit.oid != head,
        pull_request=commit.pr_revision,
        tag=tag,
    )


def _is_stale(name: str, pattern: str) -> bool:
    """Whether a file fits a pattern; a pattern without a slash is for files at the top."""
    return ("/" in pattern or "/" not in name) and fnmatchcase(name, pattern)


def _open_repo(
    api: HfApi, repo_id: str, repo_type: str, private: bool | None, space_sdk: str | None, create_pr: bool
) -> bool:
    """Make sure that the repository exists; whether it is new."""
    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
    except GatedRepoError:
        return False
    except RepositoryNotFoundError:
        if create_pr:
            raise
        api.create_repo(repo_id, repo_type=repo_type, private=private, space_sdk=space_sdk)
        return True
    if private and not info.private:
        raise ValueError(
            f"{repo_id} exists and is public: make it private in its settings first, or leave --private out."
        )
    return False


def download_text(repo_id: str, name: str, repo_type: str = "model", token: str | None = None) -> str | None:
    """A text file of a repository's main branch, `None` where there is none."""
    with suppress(EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        path = hf_hub_download(repo_id, name, repo_type=repo_type, token=token)
        return Path(path).read_text(encoding="utf-8")
    return None


# ---- errors ----


class HubError(ValueError):
    """
    What the Hub or its client did not do, in one line.

    Attributes:
        reason: the line without the part about the repository to be written.
        unreachable: no answer came: the client is offline, or the connection broke.
    """

    def __init__(self, reason: str, unreachable: bool = False, remedy: str = ""):
        super().__init__(f"{reason} {remedy}".strip())
        self.reason, self.unreachable = reason, unreachable


@contextmanager
def hub_errors(repo_id: str, repo_type: str = "model") -> Iterator[None]:
    """Turns what the Hub and its client raise into a ValueError of one line, with what to do about it."""
    try:
        yield
    except Exception as error:
        explained = explain(error, repo_id, repo_type)
        if explained is None:
            raise
        notes = " ".join(getattr(error, "__notes__", []))
        if notes:
            explained = HubError(f"{explained} {notes}", explained.unreachable)
        raise explained from error


def explain(error: BaseException, repo_id: str, repo_type: str = "model") -> HubError | None:
    """What an error of the Hub means; `None` for other errors."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    answered = next((link for link in chain if isinstance(link, HfHubHTTPError)), None)
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain) or constants.HF_HUB_OFFLINE:
        return HubError(OFFLINE, unreachable=True)
    if answered is not None:
        return HubError(_explain_answer(answered, repo_id, repo_type))
    broken = next((link for link in chain if _is_network(link)), None)
    # the client wraps what befalls a file in a RuntimeError with its name
    what = f"{error} " if isinstance(error, RuntimeError) else ""
    if broken is not None:
        what += f"The connection to {constants.ENDPOINT} broke or never stood ({type(broken).__name__}: {broken})."
    if not what:
        return None
    remedy = f"{repo_id} is as it was; run the same command again."
    return HubError(what.strip(), unreachable=broken is not None, remedy=remedy)


def _explain_answer(error: HfHubHTTPError, repo_id: str, repo_type: str) -> str:
    status = error.response.status_code if error.response is not None else 0
    message = (error.server_message or "").strip() or str(error).splitlines()[0]
    if isinstance(error, GatedRepoError):
        return f"The {repo_type} {repo_id} is gated: ask for access on its page, with the account of your token."
    if isinstance(error, RevisionNotFoundError):
        return f"The {repo_type} {repo_id} has no such revision: {message}."
    if isinstance(error, EntryNotFoundError):
        return f"{repo_id}: {message}."
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return "The Hub refuses the token (401): it is wrong, expired or withdrawn. Run `hf auth login` again."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"The {repo_type} {repo_id} does not exist, or it is private and not yours ({status}). Check the name, and "
            "`hf auth whoami`."
        )
    if status == 403:
        return (
            f"Your token may not write to {repo_id} (403: {message}). Use a token with write access to "
            f"{repo_id.split('/')[0]}, or another --repo-id."
        )
    if status in (409, 412):
        return f"{repo_id} was changed by someone else meanwhile ({status}: {message}). Run the same command again."
    if isinstance(error, BadRequestError):
        return f"The Hub takes exception to what was sent to {repo_id}: {message}"
    if status >= 500 or status == 429:
        return f"The Hub cannot take it just now ({status}: {message}). Run the same command again later."
    return f"The Hub refused ({status}: {message})."


def _is_network(error: BaseException) -> bool:
    """A connection that broke or never stood: the system's errors, and those of the client's HTTP library."""
    module = type(error).__module__.split(".")[0]
    return isinstance(error, (ConnectionError, TimeoutError)) or module in ("httpx", "httpx2", "httpcore", "requests")
