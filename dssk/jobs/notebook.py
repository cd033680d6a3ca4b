"""`results.ipynb`: haven's template on our runs, with our table and plot at its head."""

import json
from pathlib import Path

import nbformat
from haven import haven_utils

from dssk.utils.files import write_text

NOTEBOOK = "results.ipynb"
HEAD = """\
from pathlib import Path

from IPython.display import Image, Markdown, display

from dssk.jobs.haven import use_our_slurm
from dssk.jobs.table import write_table

use_our_slurm()
savedir_base = Path({savedir_base})
display(Markdown(write_table(savedir_base)))
if (savedir_base / "results.png").exists():
    display(Image(savedir_base / "results.png"))"""


def create_notebook(savedir_base: Path, scheduler: str) -> None:
    """Write the notebook into `savedir_base`, unless there is one: its owner may have changed it."""
    path = savedir_base / NOTEBOOK
    if not path.exists():
        write_text(path, nbformat.writes(notebook(savedir_base, scheduler)) + "\n")


def notebook(savedir_base: Path, scheduler: str) -> nbformat.NotebookNode:
    """haven's sections on experiments, scores and jobs; its plots read pickled scores, which we do not write."""
    literal = json.dumps(str(savedir_base))  # haven would put the path into the code as it stands
    experiments = haven_utils.load_exps_cell("SAVEDIR_BASE")
    experiments.source = (
        experiments.source.replace("job_scheduler='toolkit'", f"job_scheduler={scheduler!r}")
        .replace('"SAVEDIR_BASE"', literal)
        .strip()
    )
    return nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(HEAD.format(savedir_base=literal)),
            haven_utils.load_exps_md(),
            experiments,
            haven_utils.load_results_md(),
            haven_utils.load_results_cell(),
            haven_utils.load_jobs_md(),
            haven_utils.load_jobs_cell(),
        ]
    )
