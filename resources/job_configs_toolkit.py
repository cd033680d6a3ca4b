"""An example of `job_configs.py` for the toolkit: copy it over that file and change the names."""

# The account, from the environment variable EAI_ACCOUNT_ID, and the user's name in the names of data.
EAI_ACCOUNT_ID_TO_USER = {
    "00000000-0000-0000-0000-000000000000": "firstname_lastname",
}

ONE_GPU = {
    "image": "registry.example.org/team/cuda-python",  # has bash, and sees the environment of --python_binary
    "data": [  # mounts; {user} becomes the launching user's name
        "team.{user}.home:/mnt/home",
        "team.dssk.data:/mnt/dssk",
    ],
    "environment_vars": ["HF_HOME=/mnt/home/.cache/huggingface"],  # a key or token in here is refused
    "resources": {
        "gpu": 1,  # replaces NGPUS in --python_binary
        "gpu_mem": 32,  # GB of each GPU, at least
        # "gpu_model": "A100",  # or "!A100": any other
        "cpu": 8,
        "mem": 64,  # GB
    },
    "bid": 0,  # highest price; 0: only what is free
    "restartable": True,  # started again after a pre-emption, and the job resumes from its last checkpoint
    "preemptable": True,
    "max_run_time": 7 * 24 * 3600,  # seconds
}

EIGHT_GPUS = {
    **ONE_GPU,
    "resources": {"gpu": 8, "gpu_mem": 80, "cpu": 64, "mem": 600},
    # Whatever else your version of the client's JobSpec takes goes here unchecked: jobs of several nodes, for one.
    "job_spec": {},
}

JOB_CONFIG = {
    "default": ONE_GPU,
    "crossattn_starcoder": EIGHT_GPUS,
    "crossattn_starchat-alpha": EIGHT_GPUS,
}
