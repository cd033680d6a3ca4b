"""Write a run as one self-contained HTML page, which fetches nothing.

Figures are also written beside it as PNG, and the measurements of attention as attention.json. In place of parts whose
files do not exist yet, the page shows the command that makes them.
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
    add = parser.add_argument
    add("run_dir", metavar="RUN", help="folder of the run")
    add("--compare", metavar="DIR", help="folder that dssk compare wrote")
    add(
        "--data",
        metavar="SET",
        help="set of the comparison whose scores and samples are shown (default: the run's own scores, if any)",
    )
    add("--samples", type=count, default=24, metavar="QUESTIONS", help="sample answers to show")
    add("--output", metavar="FILE.html", help="the page (default: report.html in the run's folder)")
    return parser
