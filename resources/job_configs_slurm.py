"""An example of `job_configs.py` for Slurm: copy it over that file and change the names."""

EAI_ACCOUNT_ID_TO_USER: dict[str, str] = {}  # the toolkit's only

ONE_GPU = {
    "partition": "gpu",  # leave out a key to get the cluster's default
    # "account": "project-1234",
    # "qos": "normal",
    "gpus": 1,  # on each node; replaces NGPUS in --python_binary
    # "gpu_type": "a100",
    "cpus": 8,
    "mem": "64G",
    "time": "24:00:00",  # the job saves and queues again "save_seconds" before it is over
    "save_seconds": 120,
    "requeue": True,  # after a pre-emption, too, it queues again and resumes from what it saved
    # "options": ["--exclusive"],  # anything else that sbatch knows
}

# Two nodes of eight GPUs: sixteen ranks. torchrun gets its rendezvous from the job; leave --nnodes out.
TWO_NODES = {**ONE_GPU, "nodes": 2, "gpus": 8, "cpus": 64, "mem": "600G"}

JOB_CONFIG = {
    "default": ONE_GPU,
    "crossattn_starcoder": TWO_NODES,
    "crossattn_tiny": {"cpus": 2, "mem": "4G", "num_processes": 2},  # no GPU: two ranks on the CPU
}
