"""One log format for every process: `time level process message`, on stderr."""

import logging
import sys

# Libraries that log each request, each file or each lock; only what they warn of is of interest.
_CHATTY = ("httpx", "httpcore", "urllib3", "filelock", "huggingface_hub", "transformers", "asyncio", "uvicorn.access")


def set_up_logging(process: str, level: str) -> None:
    """Send all records of this process from `level` up to stderr. Call once, before anything logs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s.%(msecs)03d %(levelname)-7s {process:<12} %(message)s", "%H:%M:%S")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
