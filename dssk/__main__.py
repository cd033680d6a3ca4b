"""The command `dssk`: `dssk VERB` calls the `main` of `dssk/commands/VERB.py`, which imports what it needs."""

import sys
from collections.abc import Sequence
from importlib import import_module

from dssk import __version__
from dssk.errors import DsskError, exit_code_of
from dssk.utils.flags import nearest
from dssk.utils.old_names import OLD_NAMES, OldNames

VERBS = {
    "base": "make a small base model, or convert one",
    "calibrate": "choose the layer whose states a base reads best, without training",
    "real": "write the sets of questions that `make real` trains and scores on",
    "preproc": "encode the contexts of a data set, once",
    "train": "train the cross-attention blocks of an experiment",
    "evaluate": "score a checkpoint under controls",
    "compare": "compare a checkpoint with prompting and fine-tuning",
    "report": "write a run as one HTML page",
    "answer": "answer questions from texts or a library",
    "library": "store encoded contexts and search them",
    "demo": "serve a page to try a model on",
    "restore": "write contexts as an ordinary KV cache",
    "export": "write the fused model of a checkpoint",
    "publish": "upload a model, with its card",
    "inspect": "describe a store of encoded contexts",
    "verify": "check every byte of a store",
    "jobs": "compare the experiments of a folder",
    "wandb_key": "put the W&B key where jobs read it",
    "env": "print versions, devices and caches for an issue report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: dispatch(words))


def dispatch(words: list[str]) -> int | None:
    verb = words[0] if words else "--help"
    if verb in VERBS:
        return import_module(f"dssk.commands.{verb}").main(words[1:])
    if verb in ("-h", "--help"):
        print(usage())
        return None if words else DsskError.exit_code
    if verb in ("-V", "--version"):
        print(f"dssk {__version__}")
        return None
    raise DsskError(f"unknown command {verb!r}{nearest(verb, VERBS)} (see dssk --help)")


def usage() -> str:
    """The text of `dssk --help`."""
    verbs = "\n".join(f"  {verb:12}{line}" for verb, line in VERBS.items())
    return (
        "usage: dssk COMMAND [flags]\n\nCached context for frozen decoders.\n\n"
        f"{verbs}\n\ndssk COMMAND --help shows the flags of one; dssk --version the version.\n"
        "Exit codes: 0 done, 2 usage, 3 machine, 4 damaged data, 5 diverged, 6 locked, 75 stopped and saved."
    )


if __name__ == "__main__":
    old = None
    if __spec__ is not None:  # None where this is run as a file
        old = OLD_NAMES.get(__spec__.name)  # `python -m` by a name of version 0.1
        __spec__.name = "dssk.__main__"  # what processes that are spawned later look for
    # The finder has done its work, and some of the old names are modules today.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, OldNames)]
    sys.exit(main([old, *sys.argv[1:]] if old else None))
