"""Compare the experiments of a folder in a table.

The table is printed and written as results.csv and results.md, the curves of loss and F1 as results.png.
"""

from collections.abc import Sequence
from pathlib import Path

from dssk.utils.flags import Parser


def main(argv: Sequence[str] | None = None) -> None:
    savedir_base = build_parser().parse_args(argv).savedir_base
    from dssk.jobs.table import RESULTS, write_table

    text = write_table(savedir_base)
    print(text + "".join(f"{file}\n" for file in sorted(savedir_base.glob(f"{RESULTS}.*"))), end="")


def build_parser() -> Parser:
    parser = Parser(prog="dssk jobs", description=__doc__)
    parser.add_argument("savedir_base", type=Path, metavar="SAVEDIR_BASE", help="folder of the experiments")
    return parser
