"""Check every byte of a store or a library against its checksums.

    dssk verify DIR

exits with 0, or with 4 and the names of the damaged files. `--discard` deletes the damaged files and the manifest of a
store, so that the same preprocessing command makes them again and keeps the rest.
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
    parser.add_argument("folder", type=Path, metavar="DIR", help="store or library")
    parser.add_argument("--discard", action="store_true", help="delete the damaged files")
    return parser
