"""Models from the Hugging Face hub, through huggingface_hub and its cache (HF_HOME, HF_TOKEN, HF_ENDPOINT count)."""

import sys
from pathlib import Path

from ramet.launch.cache import ModelUnavailable

# Short enough that a machine without the hub starts soon.
_CHECK_S = 4.0
# The same weights in another layout.
_IGNORED = ["original/*", "consolidated*", "onnx/*"]


def cached_snapshot(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path | None:
    """The folder of an earlier download, maybe an incomplete one. Touches no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def fetch_snapshot(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Download the files that match `patterns`, unless they are in the cache. Raises ModelUnavailable."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        # Asked first: without the hub, snapshot_download would take a download that broke off for all there is.
        HfApi().model_info(repo, revision=revision, timeout=_CHECK_S)
        sys.stderr.write(f"fetching {repo} from {constants.ENDPOINT}; it is kept in {constants.HF_HUB_CACHE}\n")
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=_IGNORED))
    except Exception as error:  # of the library, of the HTTP client that it uses, of the disk
        words = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelUnavailable(f"{repo} is not here, and not to be had from {constants.ENDPOINT}: {words}") from error
