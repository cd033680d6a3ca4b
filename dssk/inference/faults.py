"""Errors that transformers raises while it loads a model or a tokenizer, as one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dssk.errors import DamagedData, DsskError, EnvironmentFault


@contextlib.contextmanager
def loading(path: str | Path, what: str = "model") -> Iterator[None]:
    """Make one line of whatever transformers raises while it reads `what` from a folder or the Hub."""
    try:
        yield
    except (DsskError, KeyboardInterrupt):
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise EnvironmentFault(f"out of memory loading {path}: take a machine with more of it") from error
    except Exception as error:
        reason = _reason(error)
        if not Path(path).exists():
            if _out_of_reach(error):
                raise EnvironmentFault(
                    f"no folder {path} here, and the Hub is out of reach: {reason}"
                ) from error
            raise DsskError(
                f"no folder {path} here, and no {what} of that name on the Hub: {reason}"
            ) from error
        if isinstance(error, ImportError):
            raise DsskError(f"{path} needs a package that is not installed: {reason}") from error
        # A configuration or a file that was altered makes it raise anything: a type nobody lists, a division by zero.
        raise DamagedData(
            f"the {what} at {path} cannot be loaded: {reason}: fetch or convert it again"
        ) from error


def _reason(error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config.json says"
    text = " ".join(str(error).split())[:300]
    return (
        text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__} {text}".strip()
    )


def _out_of_reach(error: BaseException | None) -> bool:
    """Whether the network is why: transformers' own error has the transport's as its cause."""
    while error is not None:
        module = type(error).__module__.partition(".")[0]
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError):
            return True
        if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError):
            return False  # the Hub said so
        if module in ("httpx", "httpcore", "requests"):
            return True
        error = error.__cause__ or error.__context__
    return False
