"""Requests repeated where the Hub's client gives up at the first refusal, and its errors in the user's words.

The client (huggingface_hub 2.4) repeats uploads and listings itself, but creates repositories, reads information and commits
exactly once, and lets the errors of its HTTP library through. Everything here is a pure reading of exceptions: no client is
imported before one was raised."""
from __future__ import annotations

import random
import re
import sys
import time
from typing import Callable, TypeVar

from ..errors import UserError

T = TypeVar("T")
ATTEMPTS = 5
LONGEST = 300.0       # seconds; a server that asks for more is answered by giving up
TRANSIENT = {408, 429, 500, 502, 503, 504}
# Access tokens; words such as hf_transfer are none.
SECRET = re.compile(r"\b(hf_(oauth_|jwt_)?[A-Za-z0-9]{12,}|api_org_[A-Za-z0-9]{12,})(?![A-Za-z0-9])")


def pause(seconds: float) -> None:
    """The only place that waits."""
    time.sleep(seconds)


def causes(error: BaseException):
    """The error and what it was raised from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def status(error: BaseException) -> int | None:
    """HTTP status behind an error, through what the client wrapped around it."""
    for e in causes(error):
        response = getattr(e, "response", None)
        if getattr(response, "status_code", None) is not None:
            return response.status_code
    return None


def lost(error: BaseException) -> bool:
    """Whether the connection broke before an answer: what was asked may have been done."""
    libraries = [sys.modules[name] for name in ("httpx2", "httpx", "requests") if name in sys.modules]
    kinds = tuple(getattr(m, n) for m in libraries for n in ("TransportError", "ConnectionError", "Timeout") if isinstance(getattr(m, n, None), type))
    return any(isinstance(e, (ConnectionError, TimeoutError, *kinds)) for e in causes(error)) and status(error) is None


def wait_for(error: BaseException, attempt: int) -> float | None:
    """Seconds to wait before the next attempt (0, 1, ...), or None when waiting cannot help."""
    code = status(error)
    if code in TRANSIENT:
        headers = next((e.response.headers for e in causes(error) if getattr(e, "response", None) is not None), {})
        asked = _asked(headers)
        if asked is not None:
            return asked if asked <= LONGEST else None
    elif not lost(error) or "OfflineModeIsEnabled" in {type(e).__name__ for e in causes(error)}:
        return None
    elif re.search(r"\b40[134]\b", str(error)):        # the Xet client puts a refusal in its message only
        return None
    return min(2.0 ** attempt, 30.0) * (0.75 + 0.5 * random.random())    # several processes must not come back together


def _asked(headers) -> float | None:
    """What the server asked for: `Retry-After: 7`, or the reset time of `RateLimit: "api";r=0;t=7`."""
    if re.fullmatch(r"\d+", headers.get("retry-after", "")):
        return float(headers["retry-after"]) + 1
    found = re.search(r"\bt=(\d+)", headers.get("ratelimit", ""))
    return float(found[1]) + 1 if found else None


def retried(call: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """call(), repeated after errors that pass: 408, 429, 5xx, a broken connection."""
    for attempt in range(attempts):
        try:
            return call()
        except Exception as error:
            seconds = wait_for(error, attempt)
            if seconds is None or attempt + 1 == attempts:
                raise
        pause(seconds)
    raise AssertionError("unreachable")


def scrub(text: str) -> str:
    """`text` without anything that looks like an access token."""
    return SECRET.sub("hf_***", text)


def said_by(error: BaseException) -> str:
    """The first line of an error, without tokens and without what follows the ? of an address: links for an upload are signed there."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"(\bhttps?://[^\s?'\"]+)\?[^\s'\")]+", r"\1?***", scrub(first))


def translate(error: Exception, repo: str) -> UserError | None:
    """The error in the user's words with its remedy, or None when it is none of theirs (a bug keeps its traceback)."""
    names = {type(e).__name__ for e in causes(error)}
    code = status(error)
    said = said_by(error)
    if "LocalTokenNotFoundError" in names:
        return UserError(f"{repo} needs a login: run `hf auth login` or set HF_TOKEN")
    if "HFValidationError" in names:
        return UserError(f"{repo!r} is not a repository name: give user/name")
    if "OfflineModeIsEnabled" in names:
        return UserError(f"{repo} cannot be reached: HF_HUB_OFFLINE is set; unset it first")
    if "GatedRepoError" in names:
        return UserError(f"{repo} is gated: ask for access on its page, and log in with `hf auth login` ({code})")
    if code in TRANSIENT:
        what = "asked to come back later" if code == 429 else "is not well"
        return UserError(f"the Hub {what} ({code}) and {repo} was not changed: try again in some minutes; what was uploaded is not sent again")
    remedy = {401: "log in with `hf auth login` or set HF_TOKEN to a valid token",
              403: "the token may not write there: use one with write access, or push to your own user/name",
              404: "check the user or organisation in user/name, the revision, and that the token sees private repositories",
              409: "it is in use by another change: try again"}.get(code)
    if remedy:
        return UserError(f"the Hub refused {repo} ({code}): {remedy}")
    if "xet-write-token" in str(error):
        return UserError(f"the storage of {repo} was not found (404): check that the repository still exists and push again; "
                         "for a server without Xet set HF_HUB_DISABLE_XET=1")
    if lost(error):
        return UserError(f"the connection to the Hub broke ({said}) and {repo} was not changed: push again; what was uploaded is not sent again")
    if isinstance(error, ValueError) and not isinstance(error, UserError) and ("metadata" in said.lower() or "yaml" in said.lower()):
        return UserError(f"the Hub refused the card of {repo}: {said}")
    if code == 400:
        return UserError(f"the Hub refused what was sent to {repo} (400: {said}): correct the named file or card")
    if code is not None and code > 400:          # 402: storage is full, 413, 422 ...
        told = " ".join(scrub(str(getattr(error, "server_message", None) or "")).split())
        return UserError(f"the Hub refused {repo} ({code}: {told or said}): see its page, and its storage and plan")
    return None
