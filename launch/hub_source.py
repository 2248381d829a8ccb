"""Models from the Hugging Face hub, through huggingface_hub and its cache (HF_HOME, HF_TOKEN, HF_ENDPOINT count)."""

import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

# Long enough for a slow name server, short enough that a machine without the hub starts soon.
_CHECK_S = 4.0
# The same weights in another layout.
_IGNORED = ["original/*", "consolidated*", "onnx/*"]


class HubError(Exception):
    """A model that the hub does not give; the message says why."""


def cached_snapshot(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path | None:
    """The folder of an earlier download, maybe an incomplete one. Touches no network."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if not (Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}").is_dir():
        return None
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def fetch_snapshot(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Download the files that match `patterns`, unless they are in the cache. Raises HubError."""
    import httpx
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not hub_is_reachable():
        raise HubError(f"{repo} is not on this machine, and the hub ({constants.ENDPOINT}) cannot be reached")
    if not sys.stderr.isatty():
        disable_progress_bars()
    sys.stderr.write(f"fetching {repo} from {constants.ENDPOINT}; it is kept in {constants.HF_HUB_CACHE}\n")
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=_IGNORED))
    except (OSError, ValueError, httpx.HTTPError) as error:  # the library's own errors are of the first two kinds
        words = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise HubError(f"cannot fetch {repo} from the hub: {words}") from error


def hub_is_reachable() -> bool:
    """Whether the hub answers, whatever it says, within a few seconds. Name look-up has no time limit of its own."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered, done = threading.Event(), threading.Event()

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=_CHECK_S):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError):
            return
        finally:
            done.set()

    threading.Thread(target=ask, daemon=True).start()
    done.wait(_CHECK_S)
    return answered.is_set()
