"""Describe a store of encoded contexts.

    dssk inspect DIR --plot lengths.png

prints its model, size and counts, and draws how many tokens the contexts have.
"""

from collections.abc import Sequence
from pathlib import Path

from dssk.utils.flags import Parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from dssk.store.inspect import plot_lengths, summary
    from dssk.store.opening import load_manifest

    manifest = load_manifest(args.folder)
    print("\n".join(f"{name:14}{text}" for name, text in summary(manifest).items()))
    if args.plot:
        plot_lengths(manifest, args.plot)


def build_parser() -> Parser:
    parser = Parser(prog="dssk inspect", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="store or library")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="file for the histogram of lengths")
    return parser
