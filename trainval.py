"""Train the cross-attention blocks of an experiment of `exp_configs.py`. See `python trainval.py --help`."""

import sys

import job_configs
from dssk.commands.train import main
from dssk.errors import exit_code_of
from exp_configs import EXP_GROUPS

if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(groups=EXP_GROUPS, job_configs=job_configs)))
