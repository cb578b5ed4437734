"""Models of the Hugging Face Hub: config.json and safetensors, checked by their sha256.

Files come through huggingface_hub's cache, so HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and proxies
work as usual. All files come from one commit. Each is compared with the sha256 in its cache path.
"""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from ..distributed.signals import interruptible
from ..errors import UserError, first_line
from ..files import sha256_of
from . import model_format, own_tokenizer, tokenizer_json
from .hub import http_library

SHA256 = re.compile(r"[0-9a-f]{64}")


def download(repository: str, revision: str = "", *, with_tokenizer: bool = True) -> Path:
    """The folder of the Hub's cache that holds config.json and the safetensors of a model.

    The commit of config.json is the commit of all other files.

    Args:
        repository: OWNER/NAME.
        revision: commit, tag or branch; empty: the newest.
        with_tokenizer: also get the files that say which tokenizer it has.

    Raises:
        UserError: no such model or revision, no access, no connection, no safetensors, damage.
    """
    offline = _offline()
    config = _fetch(repository, model_format.CONFIG_FILE, revision, offline)
    folder = config.parent
    # Another kind of network is refused before gigabytes of weights are downloaded.
    model_format.config_from_hf(model_format.read_json(config), config)
    commit = folder.name
    try:
        _verify(_fetch(repository, model_format.WEIGHTS_FILE, commit, offline))
    except _Missing as error:
        try:
            index = _fetch(repository, model_format.INDEX_FILE, commit, offline)
        except _Missing:
            if error.in_cache:
                raise error from None
            raise UserError(
                f"{repository} at {commit[:12]} has no safetensors (pickles are not read); "
                "save_pretrained of transformers makes them"
            ) from None
        for name in model_format.index_files(index):
            _verify(_fetch(repository, name, commit, offline))
    if with_tokenizer:
        _fetch_tokenizer(repository, folder, offline)
    return folder


def _fetch_tokenizer(repository: str, folder: Path, offline: str) -> None:
    """Gets what there is of the tokenizer's files.

    Raises:
        UserError: without the Hub, a cache that does not show whether the model has a tokenizer:
            GPT-2's would be a guess.
    """
    from huggingface_hub import try_to_load_from_cache

    commit, missing = folder.name, {}
    for name in own_tokenizer.DOWNLOADED:
        try:
            _fetch(repository, name, commit, offline)
        except _Missing as error:
            missing[name] = error
    name = tokenizer_json.JSON_FILE
    unknown = name in missing and try_to_load_from_cache(repository, name, revision=commit) is None
    if unknown and missing[name].in_cache and tokenizer_json.content_of(folder) is None:
        raise missing[name]


class _Missing(UserError):
    """The repository lacks a file; without the Hub, the cache lacks it (`in_cache`)."""

    in_cache = False


def _fetch(repository: str, name: str, revision: str, offline: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _as_user_error(repository, name, revision, offline), interruptible():
        found = hf_hub_download(
            repository, name, revision=revision or None, local_files_only=bool(offline)
        )
        return Path(found)


def _offline() -> str:
    """Why only the cache is asked: by order, or a name that does not resolve; "": the Hub is."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    host = urlsplit(constants.ENDPOINT).hostname
    if not host or getproxies().keys() - {"no"}:  # a proxy resolves names itself
        return ""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return f"the name {host} does not resolve (no network?)"
    return ""


def _verify(path: Path) -> None:
    """Raises UserError for a file that differs from its sha256.

    The cache names a file by its sha256, except on systems without symbolic links.
    """
    kept = path.resolve()
    if SHA256.fullmatch(kept.name) and sha256_of(kept) != kept.name:
        raise UserError(f"{kept} is damaged (its sha256 differs); delete it and try again")


@contextmanager
def _as_user_error(repository: str, name: str, revision: str, offline: str) -> Iterator[None]:
    """Turns errors of huggingface_hub into a UserError; `offline`: why the cache alone is asked."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repository}"
    try:
        yield
    except errors.GatedRepoError:
        text = f"no access to {repository}: set HF_TOKEN or run `hf auth login`, and accept the "
        raise UserError(f"{text}terms at {page}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{repository}: no such file or folder here, and no such model at {page} (a private "
            "one needs HF_TOKEN or `hf auth login`)"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repository} has no revision {revision}; see {page}") from None
    except errors.LocalEntryNotFoundError as error:
        if offline:
            way = "unset it" if constants.HF_HUB_OFFLINE else "try again with a network"
            missing = _Missing(
                f"{repository}: no such file or folder here, {offline} and the cache lacks its "
                f"{name}; {way}, or download first"
            )
            missing.in_cache = True
            raise missing from None
        reason = first_line(error.__cause__ or error)
        raise UserError(f"cannot get {name} of {page}: {reason}; try again") from None
    except errors.EntryNotFoundError:
        raise _Missing(f"{repository} has no {name}; see {page}") from None
    except RuntimeError as error:
        # huggingface_hub 1.26 tries again with the client that it closed after a lost connection.
        if "client has been closed" not in str(error):
            raise
        raise UserError(
            f"cannot get {name} of {page}: connection refused or lost; try again"
        ) from None
    except (errors.HFValidationError, http_library().HTTPError, OSError) as error:
        raise UserError(f"{repository}: {first_line(error)}; see {page}") from None
