"""Put the key of Weights & Biases where jobs read it: .wandb_key in the current directory, mode 0600.

The key comes from WANDB_API_KEY, else from ~/.netrc. It is never shown, and never an argument of a command.
"""

from collections.abc import Sequence
from pathlib import Path

from dssk.utils.flags import Parser
from dssk.utils.wandb_key import KEY_FILE, write_key


def main(argv: Sequence[str] | None = None) -> None:
    build_parser().parse_args(argv)
    path = Path.cwd() / KEY_FILE
    write_key(path)
    print(f"the W&B key is in {path}, for jobs to read")


def build_parser() -> Parser:
    return Parser(prog="dssk wandb_key", description=__doc__)
