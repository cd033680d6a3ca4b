"""Write a run as one page.

The page holds all it needs and fetches nothing. Its figures lie beside it as PNG, and what was measured about
attention as attention.json. Parts whose files are not there yet are left out, with the command that makes them.
"""

import sys
from collections.abc import Sequence

from dssk.utils.flags import Parser, count


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(words)
    from dssk.report.write import write_report
    from dssk.utils.console import quiet_libraries

    quiet_libraries()
    write_report(**vars(args), command=["dssk", "report", *words])


def build_parser() -> Parser:
    parser = Parser(prog="dssk report", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN", help="a run's folder, as dssk train made it")
    parser.add_argument("--compare", metavar="DIR", help="folder that dssk compare wrote")
    parser.add_argument(
        "--data",
        metavar="SET",
        help="show scores and samples of this set of the comparison (the run's own, if it was scored)",
    )
    parser.add_argument(
        "--samples", type=count, default=24, metavar="QUESTIONS", help="to show with their answers"
    )
    parser.add_argument("--output", metavar="FILE.html", help="the page (report.html in the run's folder)")
    return parser
