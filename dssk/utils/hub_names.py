"""Telling a name on the Hugging Face Hub from a path: nothing is fetched for a path that was mistyped."""

import re
from pathlib import Path

from dssk.errors import DsskError

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def hub_name(name: str | None) -> str | None:
    """`name` if it is USER/NAME and nothing that lies here, else None."""
    return name if name and HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def is_on_hub(name: str, what: str = "model") -> bool:
    """Whether `name` is USER/NAME on the Hub; False for what lies here.

    Raises `DsskError` for what is neither, and for what reads like a path below a folder that is here.
    """
    if Path(name).exists():
        return False
    if hub_name(name) is None:
        raise DsskError(f"no {what} at {name}: there is no such folder, and a name on the Hub is USER/NAME")
    owner, rest = name.split("/")
    if Path(owner).exists():
        raise DsskError(
            f"no {what} at {name}: {owner} is here and holds no {rest}; if it is a name on the Hub, fetch it by "
            f"`hf download {name} --local-dir DIR` and name that folder"
        )
    return True
