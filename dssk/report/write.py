"""Writing a run as one page.

The page holds all it needs and fetches nothing. Its figures lie beside it as PNG, and what was measured about
attention as attention.json. Parts whose files are not there yet are left out, with the command that makes them.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from dssk.report import figures
from dssk.report.contents import Contents
from dssk.report.page import render
from dssk.report.run_files import RunFiles, read_run
from dssk.run_folder import ATTENTION, REPORT
from dssk.training.wandb_report import log_report
from dssk.utils.files import only_writer, remove_left, write_json, write_text


def write_report(
    run_dir: str,
    compare: str | None,
    data: str | None,
    samples: int,
    output: str | None,
    command: Sequence[str],
) -> None:
    """Run `dssk report`; the arguments are its flags, and the command as it was typed, for the page."""
    files = read_run(run_dir, compare, data)
    page = Path(output) if output else files.folder / REPORT
    with only_writer(page):
        _write(page, files, run_dir, samples, command)


def _write(page: Path, files: RunFiles, run_dir: str, samples: int, command: Sequence[str]) -> None:
    contents = Contents(files, samples)
    drawn = contents.figures()
    svgs = {name: figures.svg(figure) for name, figure in drawn.items()}
    pngs = [page.with_name(f"{page.stem}-{name}.png") for name in drawn]
    attention = page.with_name(ATTENTION)
    remove_left(page, attention, *pngs)
    html = render(**contents.parts(run_dir), figures=svgs, command=shlex.join(command))
    write_text(page, html.encode(errors="replace").decode())  # JSON can say half a character
    for figure, png in zip(drawn.values(), pngs, strict=True):
        figures.write_png(figure, png)
    if found := contents.evidence:
        write_json(attention, dataclasses.asdict(found))
        print(
            f"block {found.block + 1}, head {found.head + 1}: the most attended token lies inside the answer for "
            f"{found.share:.1%} of {found.n} correctly answered questions"
        )
    log_report(files.folder, page, pngs)
    print(page)
