"""Train the cross-attention blocks of an experiment of `exp_configs.py`. See `python trainval.py --help`."""

import sys

import job_configs
from dssk.commands.train import main
from dssk.errors import run
from exp_configs import EXP_GROUPS

if __name__ == "__main__":
    sys.exit(run(lambda: main(groups=EXP_GROUPS, job_configs=job_configs)))
