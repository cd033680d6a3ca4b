"""Check that a store is what was written, byte for byte.

    dssk verify DIR

ends with exit code 0 if it is, and with 4 and the names of the damaged files if it is not. `--discard` deletes the
damaged files and the manifest, so that the preprocessing command makes them again and keeps the rest.
"""

from collections.abc import Sequence
from pathlib import Path

from dssk.utils.flags import Parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from dssk.store import verify
    from dssk.utils import files

    if args.discard:
        damaged = verify.discard(args.folder)
        print(
            f"Discarded {len(damaged)} damaged files: start the preprocessing command again to make them anew."
        )
        return
    infos = verify.check(args.folder, anew=True).all_files
    num_bytes = sum(info.num_bytes for info in infos.values())
    print(f"{len(infos)} files, {files.size(num_bytes)}: all as written.")


def build_parser() -> Parser:
    parser = Parser(prog="dssk verify", description=__doc__)
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="folder that dssk preproc or dssk library made"
    )
    parser.add_argument(
        "--discard", action="store_true", help="delete what is damaged, to have it made again"
    )
    return parser
