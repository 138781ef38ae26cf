"""Turns errors of huggingface_hub into ModelErrors of one line, with the command that helps.

Nothing that a server or a library wrote goes into such a line, except the name of an error: a token could be in it.
"""

from __future__ import annotations

import errno
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import constants, errors, get_token

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.misspellings import meant_instead, slip_line
from batchmill.jobs.models.spec import ModelSpec

_TOKENS_PAGE = f"{constants.HUGGINGFACE_CO_URL_HOME}settings/tokens"
_TOO_MANY, _FORBIDDEN, _UNAUTHORIZED = 429, 403, 401


class HubUnreachable(ModelError):
    """The Hub gave no answer: no network, HF_HUB_OFFLINE, or a Hub that is down. The cache still serves."""


def pull_command(name: str, revision: str | None) -> str:
    """The command that brings a repository into this machine's cache."""
    words = ["batchmill", "models", "pull", name]
    return shlex.join(words if revision is None else [*words, "--revision", revision])


@contextmanager
def translated(name: str, revision: str | None) -> Iterator[None]:
    """A context that turns huggingface_hub's errors about this repository into a ModelError, or HubUnreachable."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        # The gateway of a library that raises its own errors, those of its HTTP client, and the system's.
        at = name if revision is None else f"{name}@{revision}"
        chain = list(_chain(error))
        for kind, tell in _REASONS:
            cause = next((each for each in chain if isinstance(each, kind)), None)
            if cause is not None:
                raised = HubUnreachable if kind in _UNREACHABLE or _is_down(cause) else ModelError
                # Without the cause: a traceback of it would show what its message does.
                raise raised(f"cannot fetch {at}: {tell(cause, name, revision)}") from None
        raise ModelError(f"cannot fetch {at}: {type(error).__name__}; {_again(name, revision)}") from None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _endpoint() -> str:
    """The Hub's address without what a user may have written into it to log in."""
    parts = urlsplit(constants.ENDPOINT)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"


def _again(name: str, revision: str | None) -> str:
    return f"run `{pull_command(name, revision)}` again"


def _offline(_error: BaseException, name: str, revision: str | None) -> str:
    return (
        f"it is not whole in the cache of this machine ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set; "
        f"run `HF_HUB_OFFLINE=0 {pull_command(name, revision)}` where there is a network"
    )


def _unreachable(error: BaseException, name: str, revision: str | None) -> str:
    if (meant := meant_instead(ModelSpec(name))) is not None:
        return slip_line(ModelSpec(name), meant)
    return (
        f"it is not whole in the cache of this machine ({constants.HF_HUB_CACHE}), and the Hugging Face Hub cannot be "
        f"reached at {_endpoint()} ({type(error).__name__}); run `{pull_command(name, revision)}` when there is a "
        "network, or on a machine that has one, and copy its cache (HF_HOME) here"
    )


def _gated(_error: BaseException, name: str, revision: str | None) -> str:
    page = f"{_endpoint()}/{name}"
    again = pull_command(name, revision)
    if get_token() is None:
        return (
            f"it is gated; accept its terms at {page}, make a token at {_TOKENS_PAGE}, then "
            f"`export HF_TOKEN=...` (or `hf auth login`) and run `{again}`"
        )
    return (
        f"it is gated, and the token of this machine gives no access to it; accept its terms at {page} with the "
        f"token's account, let a fine-grained token read gated repositories, then run `{again}`"
    )


def _no_repository(_error: BaseException, name: str, revision: str | None) -> str:
    ways = "log in as one who may read it" if get_token() else "`export HF_TOKEN=...` (or `hf auth login`)"
    return (
        f"the Hub at {_endpoint()} has no such repository, or it is a private one; check the name, or, where it is "
        f"private, {ways} and run `{pull_command(name, revision)}`"
    )


def _no_revision(_error: BaseException, name: str, _revision: str | None) -> str:
    return f"it has no such revision; those that it has are listed at {_endpoint()}/{name}/commits, for --revision"


def _disabled(_error: BaseException, _name: str, _revision: str | None) -> str:
    return "the Hub has disabled access to it; choose another model"


def _no_file(_error: BaseException, name: str, revision: str | None) -> str:
    return f"a file that the Hub lists is not there; {_again(name, revision)}, and look at the repository if it stays"


def _answered(error: BaseException, name: str, revision: str | None) -> str:
    """Explains an answer of another status than success."""
    assert isinstance(error, errors.HfHubHTTPError)
    status = error.response.status_code
    if status == _UNAUTHORIZED:
        return (
            "the Hub does not know the token of this machine (HF_TOKEN, or the saved login); make a new one at "
            f"{_TOKENS_PAGE} and `export HF_TOKEN=...`, or unset it for a public model"
        )
    if status == _FORBIDDEN:
        return (
            f"the Hub refuses access to it (403); accept its terms at {_endpoint()}/{name}, and `export HF_TOKEN=...` "
            "with a token that may read it"
        )
    if status == _TOO_MANY:
        return f"the Hub takes no more requests for now (429); log in with HF_TOKEN, wait, and {_again(name, revision)}"
    return f"the Hub answered with an error ({status}); wait, and {_again(name, revision)}"


def _no_hub(_error: BaseException, _name: str, _revision: str | None) -> str:
    return (
        f"what answers at {_endpoint()} is not a Hugging Face Hub; check HF_ENDPOINT, the proxy settings, and whether "
        "the network wants a login"
    )


def _bad_token(_error: BaseException, _name: str, _revision: str | None) -> str:
    return "the token in HF_TOKEN (or the saved login) holds characters that no token has; set it again"


def _bad_name(_error: BaseException, _name: str, _revision: str | None) -> str:
    return "this is no name of a repository; write ORG/NAME"


def _system(error: BaseException, name: str, revision: str | None) -> str:
    """Explains a refusal of the machine itself: its disk, or its rights."""
    assert isinstance(error, OSError)
    cache = constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left in {cache}; free some, or set HF_HOME to a folder on a larger disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"the cache {cache} cannot be written; set HF_HOME to a folder that you may write"
    if error.errno is not None:
        return f"{type(error).__name__} ({errno.errorcode.get(error.errno, error.errno)}) in the cache {cache}"
    return f"a file came with another size than the Hub tells of; {_again(name, revision)}"


def _is_down(error: BaseException) -> bool:
    """True for a Hub that answers, and that has no answer for anybody at the moment."""
    return isinstance(error, errors.HfHubHTTPError) and error.response.status_code >= httpx2.codes.INTERNAL_SERVER_ERROR


_Kind = type[BaseException]
_UNREACHABLE: tuple[_Kind, ...] = (errors.OfflineModeIsEnabled, httpx2.TransportError)
#: The first kind that matches an error of the chain decides, so the narrow kinds come first.
_REASONS: tuple[tuple[_Kind, Callable[[BaseException, str, str | None], str]], ...] = (
    (errors.OfflineModeIsEnabled, _offline),
    (errors.GatedRepoError, _gated),
    (errors.RepositoryNotFoundError, _no_repository),
    (errors.RevisionNotFoundError, _no_revision),
    (errors.DisabledRepoError, _disabled),
    (errors.RemoteEntryNotFoundError, _no_file),
    (errors.FileMetadataError, _no_hub),
    (httpx2.LocalProtocolError, _bad_token),
    (UnicodeEncodeError, _bad_token),
    (httpx2.TransportError, _unreachable),
    # Last of the Hub's own: an error without an answer in it, such as LocalEntryNotFoundError, hides its cause.
    (errors.HfHubHTTPError, _answered),
    (errors.HFValidationError, _bad_name),
    (ValueError, _no_hub),
    (LookupError, _no_hub),
    (TypeError, _no_hub),
    (OSError, _system),
)
