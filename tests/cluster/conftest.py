"""A real Slurm of two nodes on the loopback interface, for the time of the tests."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.jobs.conftest import checkout, executable, three_experiments

__all__ = ["checkout", "executable", "three_experiments"]

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n0", "n1")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerParameters=sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n[0-1] Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=n[0-1] PriorityTier=10 MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """The environment in which Slurm's commands talk to the test's own cluster."""
    missing = [name for name in COMMANDS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing:
        pytest.skip(f"no Slurm: {', '.join(missing)} missing; tests/cluster/install_slurm.sh installs it")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
    (folder / "state").mkdir()
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            folder=folder,
            ports=free_ports(3),
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
        )
    )
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def start(*argv: str) -> None:
        subprocess.run(argv, check=True, env=os.environ | environment, stderr=subprocess.DEVNULL)

    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    try:
        start("munged", "--force", *(f"--{flag}={folder}/munge.{name}" for flag, name in files.items()))
        start("slurmctld", "-c")
        for node in NODES:
            start("slurmd", "-N", node)
        wait_for(lambda: slurm(environment, "sinfo", "--noheader", "--format=%t %D") == "idle 2", 30)
        yield environment
    finally:
        subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=os.environ | environment)
        time.sleep(2)
        for name in (*NODES, "slurmctld", "munge"):
            file = folder / f"{name}.pid"
            if file.exists():
                os.kill(int(file.read_text()), signal.SIGTERM)
        time.sleep(1)
        shutil.rmtree(folder, ignore_errors=True)


def slurm(environment: dict[str, str], *argv: str) -> str:
    """What one of Slurm's commands prints."""
    done = subprocess.run(argv, env=os.environ | environment, capture_output=True, text=True, check=True)
    return "\n".join(line.strip() for line in done.stdout.strip().splitlines())


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out after {seconds} s"
        time.sleep(0.5)
