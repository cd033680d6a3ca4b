"""Where jobs run: data for `trainval.py -j toolkit` and `-j slurm`.

What each key means is written beside its type in `dssk/jobs/config.py`; examples to start from, with every key
explained, are `resources/job_configs_toolkit.py` and `resources/job_configs_slurm.py`.
"""

# Toolkit only: who launches. The account is the environment variable EAI_ACCOUNT_ID of the launching machine.
EAI_ACCOUNT_ID_TO_USER: dict[str, str] = {}

# The job of each group of exp_configs.py; "default" serves the groups that are not named.
JOB_CONFIG: dict[str, dict] = {}
