"""Write a run as one page: `python -m dssk.report RUN_DIR [--compare DIR] [--samples 24] [--output FILE]`.

The page holds all it needs and fetches nothing. Its figures lie beside it as PNG, and what was measured about
attention as attention.json. Parts whose files are not there yet are left out, with the command that makes them.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dssk.errors import run
from dssk.report import figures
from dssk.report.contents import Contents
from dssk.report.page import render
from dssk.report.run_files import read_run
from dssk.training.wandb_report import log_report
from dssk.utils.console import quiet_libraries
from dssk.utils.files import make_folder, publish_json, publish_text
from dssk.utils.flags import Parser, count


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    args = parse_args(words)
    quiet_libraries()
    files = read_run(args.run_dir, args.compare, args.data)
    output = Path(args.output) if args.output else files.folder / "report.html"
    make_folder(output.parent)

    contents = Contents(files, args.samples)
    drawn = contents.figures()
    svgs = {name: figures.svg(figure) for name, figure in drawn.items()}
    command = shlex.join(["python", "-m", "dssk.report", *words])
    publish_text(output, render(**contents.parts(args.run_dir), figures=svgs, command=command))

    pngs = [output.with_name(f"{output.stem}-{name}.png") for name in drawn]
    for figure, png in zip(drawn.values(), pngs, strict=True):
        figures.write_png(figure, png)
    if found := contents.evidence:
        publish_json(output.with_name("attention.json"), dataclasses.asdict(found))
        print(
            f"block {found.block + 1}, head {found.head + 1}: the most attended token lies inside the answer for "
            f"{found.share:.1%} of {found.n} correctly answered questions"
        )
    log_report(files.folder, output, pngs)
    print(output)


def parse_args(words: Sequence[str]):
    parser = Parser(prog="python -m dssk.report", description=__doc__)
    parser.add_argument("run_dir", help="a run's folder, as trainval.py made it")
    parser.add_argument("--compare", help="folder that dssk.evaluation.compare wrote")
    parser.add_argument(
        "--data",
        help="show scores and samples of this set of the comparison (the run's own, if it was scored)",
    )
    parser.add_argument(
        "--samples", type=count, default=24, help="questions to show with their answers (%(default)s)"
    )
    parser.add_argument("--output", help="the page (report.html in the run's folder)")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(run(main))
