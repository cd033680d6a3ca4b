"""The key of Weights & Biases on its way to a job: a file for its owner alone, never an argument or a log line.

`dssk wandb_key` copies the key from `WANDB_API_KEY` or `~/.netrc` to `.wandb_key`.
"""

import contextlib
import netrc
import os
import stat
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from dssk.errors import DsskError

KEY_FILE = ".wandb_key"  # in .gitignore and .havenignore
KEY_FILE_VARIABLE = "DSSK_WANDB_KEY_FILE"  # where a job finds it: the path is no secret
MAX_KEY_BYTES = 4096


def give_key_to_wandb() -> None:
    """Let wandb find the key of the key file, on rank 0 only; one of the environment or of `~/.netrc` comes first."""
    path = Path(os.environ.get(KEY_FILE_VARIABLE) or Path.cwd() / KEY_FILE)
    if os.environ.get("RANK", "0") == "0" and find_key() is None and os.path.lexists(path):
        os.environ["WANDB_API_KEY"] = read_key(path)


def find_key() -> str | None:
    """The user's key: `WANDB_API_KEY`, else the one of W&B's host in `~/.netrc`."""
    if key := os.environ.get("WANDB_API_KEY", "").strip():
        return key
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if entry := netrc.netrc().authenticators(host):
            return entry[2]
    return None


def read_key(path: Path) -> str:
    """The key in a file that nobody but its owner, who is us, can read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise DsskError(
            f"{path}: {error.strerror}: want a plain file, as ./copy_wandb_key.sh makes it"
        ) from None
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
            raise DsskError(
                f"{path} is not a file of yours with mode 0600: remove it and run ./copy_wandb_key.sh"
            )
        return os.read(descriptor, MAX_KEY_BYTES).decode().strip()
    finally:
        os.close(descriptor)


def write_key(path: Path) -> None:
    """Store the user's key in `path`, mode 0600 from its first moment; refuse a target that could leak it."""
    key = find_key()
    if key is None:
        raise DsskError("no W&B key: set WANDB_API_KEY, or run `wandb login`, which writes ~/.netrc")
    tracked = ["git", "-C", str(path.parent), "ls-files", "--error-unmatch", "--", path.name]
    with contextlib.suppress(FileNotFoundError):  # no git, nothing tracked
        if subprocess.run(tracked, capture_output=True).returncode == 0:
            raise DsskError(
                f"{path} is tracked by git: `git rm --cached` it, and change the key if it was committed"
            )
    if os.path.lexists(path):
        read_key(path)  # refuses links and loose modes
        path.unlink()
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(f"{key}\n")
