"""Patches on the Hugging Face hub, through `huggingface_hub`: three files in a model repository, nothing pickled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from errata.errors import InputError, StorageError

FILES = ("patch.json", "patch.safetensors", "README.md")
NAME = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/NAME


def push(repo: str, files: Mapping[str, bytes], *, private: bool | None, token: str | None, revision: str | None, message: str) -> str:
    """One commit with all files, so that nobody ever reads a half; the commit's address.  `StorageError` says what the hub says."""
    from huggingface_hub import CommitOperationAdd, HfApi

    _check(repo)
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        return str(api.create_commit(repo, operations, commit_message=message, revision=revision).commit_url)
    except Exception as error:  # the client's HTTP library, and so its errors, differs from version to version
        raise StorageError(f"{repo}: the hub did not take the patch ({_first(error)}); `hf auth login` gives a token for it") from None


def fetch(repo: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder in the hub's cache that holds the repository's patch; fetched once a commit."""
    from huggingface_hub import snapshot_download

    _check(repo)
    try:
        return Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=list(FILES)))
    except Exception as error:  # as above
        raise StorageError(f"{repo}: could not be fetched from the hub ({_first(error)}); check name, revision and network") from None


def _check(repo: str) -> None:
    if not NAME.fullmatch(repo):
        raise InputError(f"{repo!r} is no repository of the hub; write OWNER/NAME")


def _first(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
