"""Train the cross-attention blocks of an experiment of `exp_configs.py`. See `python trainval.py --help`."""

import sys

from dssk.cli import parse_args
from dssk.errors import run
from dssk.training.run import train
from exp_configs import EXP_GROUPS


def main() -> None:
    train(parse_args(), EXP_GROUPS)


if __name__ == "__main__":
    sys.exit(run(main))
