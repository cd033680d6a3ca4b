"""Modules that version 0.1 ran with `python -m`, and the commands that have replaced them."""

import importlib.util
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

OLD_NAMES = {
    "dssk.answer": "answer",
    "dssk.demo": "demo",
    "dssk.library": "library",
    "dssk.publish": "publish",
    "dssk.export": "export",
    "dssk.report": "report",
    "dssk.wandb_key": "wandb_key",
    "dssk.data.inspect": "inspect",
    "dssk.data.verify": "verify",
    "dssk.evaluation.evaluate": "evaluate",
    "dssk.evaluation.compare": "compare",
    "dssk.models.make_base": "base",
    "dssk.jobs.table": "jobs",
}


class OldNames(MetaPathFinder):
    """Finds `dssk/__main__.py` for each of them; that file sees by which name it was found."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in OLD_NAMES:
            return None
        return importlib.util.spec_from_file_location(fullname, Path(__file__).parents[1] / "__main__.py")
