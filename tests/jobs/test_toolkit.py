"""The founding document's haven block, on a toolkit that keeps jobs in a folder and runs them with bash."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dssk.config import experiment_id
from tests.jobs.conftest import TOOLKIT_JOB, kill_session, wait_until

# The founding document's, with names, paths and numbers changed, and W&B left out.
LAUNCH = """
export ENV_PATH="{env}"
if [[ -n "$ENV_PATH" ]]
then
  export LAUNCH_CMD="source activate "${{ENV_PATH}}" ; "${{ENV_PATH}}"/bin/torchrun --nproc-per-node NGPUS "
else
  export LAUNCH_CMD="torchrun --nproc-per-node NGPUS "
fi
export EXP_GROUP="crossattn_test"
export NSTEPS=4_0
export LOG_NSTEPS=10
export EXP_SAVEDIR="{savedir}"
export DATA_SAVEDIR="{data}"
python trainval.py \\
-e $EXP_GROUP \\
--steps $NSTEPS \\
--log_every $LOG_NSTEPS \\
-sb "$EXP_SAVEDIR" \\
-r 1 \\
--data_path $DATA_SAVEDIR \\
--python_binary "${{LAUNCH_CMD}}" \\
--j toolkit
"""


def kill_at_first_checkpoint(savedir: Path, jobs: Path) -> None:
    """Kill a job and all that it started, as a node that dies does."""
    wait_until(lambda: list(savedir.glob("checkpoint-*/dssk_manifest.json")))
    job = jobs / json.loads((savedir / "job_dict.json").read_text())["job_id"]
    kill_session(int((job / "pid").read_text()))


@pytest.mark.slow
def test_the_founding_documents_block_trains_every_experiment_and_a_failed_one_resumes(
    toolkit, tmp_path, store_path, three_experiments
):
    toolkit.configure(three_experiments, TOOLKIT_JOB)
    savedir_base, jobs = tmp_path / "exp data", Path(toolkit.environment["FAKE_TOOLKIT"])
    launch = LAUNCH.format(env=tmp_path / "p2", savedir=savedir_base, data=store_path)
    ids = [experiment_id(exp_dict) for exp_dict in three_experiments]
    victim = savedir_base / ids[1]
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_at_first_checkpoint, victim, jobs)
        submitted = toolkit.bash(launch).stdout
        assert all(exp_id in submitted for exp_id in ids)
        killed.result()
    wait_until(lambda: len(list(jobs.glob("*/exit"))) == 3)
    again = launch.replace("-r 1", "-r 0 --job_action run")
    submitted = toolkit.bash(again).stdout
    assert submitted.count("IGNORED: Job COMPLETED") == 2
    assert f"{ids[1]}  SUBMITTED: Retrying FAILED Job" in submitted

    wait_until(lambda: len(list(jobs.glob("*/exit"))) == 4)
    assert "3 COMPLETED" in toolkit.bash(again.replace("action run", "action status")).stdout
    assert "resuming from step" in (victim / "logs.txt").read_text()
    for exp_id, exp_dict in zip(ids, three_experiments, strict=True):
        savedir = savedir_base / exp_id
        assert json.loads((savedir / "exp_dict.json").read_text()) == exp_dict
        assert (savedir / "final" / "model.safetensors").exists()
        lines = [json.loads(line) for line in (savedir / "metrics.jsonl").read_text().splitlines()]
        assert max(line["step"] for line in lines) == 40
