"""Terminal output of commands: progress bars on a terminal only, and little from libraries."""

import logging
import os
import sys

from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Turn off libraries' progress bars of loading weights, and notices about settings that are chosen here.

    Tokenizers stay in one thread: they run in data-loading processes, which are parallel already.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.trainer").setLevel(logging.WARNING)


def watched() -> bool:
    """Whether standard error is a terminal, on which progress bars are shown."""
    return sys.stderr.isatty()
