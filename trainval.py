"""Train the cross-attention blocks of an experiment of `exp_configs.py`. See `python trainval.py --help`."""

import sys

import job_configs
from dssk.errors import run
from dssk.jobs.submit import submit
from dssk.training.flags import parse_args
from dssk.training.run import train
from dssk.utils.wandb_key import give_key_to_wandb
from exp_configs import EXP_GROUPS


def main() -> None:
    args = parse_args(groups=EXP_GROUPS)
    if args.job_scheduler and not args.dry_run:
        submit(args, EXP_GROUPS, job_configs)
        return
    if args.wandb_project_name:
        give_key_to_wandb()
    train(args, EXP_GROUPS)


if __name__ == "__main__":
    sys.exit(run(main))
