"""What commands show: progress bars where someone watches, our own lines, and little of the libraries'."""

import logging
import os
import sys

from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """No bars of loading weights among our own lines, no notice of things that we decide ourselves.

    Tokenizers stay in one thread: they run in data-loading processes, which are parallel already.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.trainer").setLevel(logging.WARNING)


def watched() -> bool:
    """Whether someone sees progress bars."""
    return sys.stderr.isatty()
