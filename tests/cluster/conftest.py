"""A real Slurm of two nodes on the loopback interface, for the time of the tests."""

import contextlib
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
{accounting}
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
MinJobAge={seconds_known}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n[0-1] Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=n[0-1] PriorityTier=10 MaxTime=INFINITE State=UP
"""

DATABASE = """\
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""
PATH = f"{os.environ['PATH']}:/usr/sbin"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def cluster():
    """The environment in which Slurm's commands talk to the test's own cluster, which keeps no accounts."""
    need(*COMMANDS)
    with running_cluster("AccountingStorageType=accounting_storage/none", seconds_known=300) as environment:
        yield environment


@pytest.fixture
def cluster_with_accounts():
    """A cluster with accounting, whose `squeue` forgets a job within seconds of its end."""
    need(*COMMANDS, "mariadbd", "mariadb-install-db", "slurmdbd")
    with running_database() as database_port:
        (port,) = free_ports(1)
        accounting = f"AccountingStorageType=accounting_storage/slurmdbd\nAccountingStoragePort={port}"
        with running_cluster(accounting, seconds_known=2, database=(database_port, port)) as environment:
            yield environment


def need(*commands: str) -> None:
    missing = [name for name in commands if not shutil.which(name, path=PATH)]
    if missing:
        pytest.skip(f"no Slurm: {', '.join(missing)} missing; tests/cluster/install_slurm.sh installs it")


@contextlib.contextmanager
def running_database():
    """A MariaDB with a user and a database for slurmdbd; yields its port."""
    folder = Path(tempfile.mkdtemp(prefix="mariadb-"))
    (port,) = free_ports(1)
    user = f"--user={getpass.getuser()}"
    install = [
        "mariadb-install-db",
        user,
        f"--datadir={folder}/data",
        "--auth-root-authentication-method=normal",
    ]
    subprocess.run(
        [*install, "--skip-test-db"], check=True, env=os.environ | {"PATH": PATH}, capture_output=True
    )
    server = subprocess.Popen(
        [
            *("mariadbd", "--no-defaults", user, f"--datadir={folder}/data", f"--socket={folder}/socket"),
            *(f"--port={port}", "--bind-address=127.0.0.1", f"--pid-file={folder}/pid"),
        ],
        env=os.environ | {"PATH": PATH},
        stderr=subprocess.DEVNULL,
    )
    try:
        sql = "create user slurm identified by 'slurm'; grant all on slurm_acct_db.* to slurm;"
        sql += "create user slurm@localhost identified by 'slurm'; grant all on slurm_acct_db.* to slurm@localhost;"
        client = ["mariadb", "--no-defaults", "--user=root", f"--socket={folder}/socket", "--execute", sql]
        wait_for(lambda: subprocess.run(client, capture_output=True).returncode == 0, 30)
        yield port
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running_cluster(accounting: str, seconds_known: int, database: tuple[int, int] | None = None):
    """munged, slurmctld and two slurmd, with slurmdbd on a database if there is one: (its port, slurmdbd's)."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
    (folder / "state").mkdir()
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    if database:
        accounting += f"\nAccountingStoragePass={folder}/munge.socket"
    facts = {"folder": folder, "host": socket.gethostname().split(".")[0], "user": getpass.getuser()}
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(ports=free_ports(3), accounting=accounting, seconds_known=seconds_known, **facts)
    )
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}

    def start(*argv: str) -> None:
        subprocess.run(argv, check=True, env=os.environ | environment, stderr=subprocess.DEVNULL)

    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    try:
        start("munged", "--force", *(f"--{flag}={folder}/munge.{name}" for flag, name in files.items()))
        if database:
            text = DATABASE.format(dbd_port=database[1], database_port=database[0], **facts)
            (folder / "slurmdbd.conf").write_text(text)
            (folder / "slurmdbd.conf").chmod(0o600)
            start("slurmdbd")
            ask = ["sacctmgr", "--immediate", "add", "cluster", "test"]
            wait_for(
                lambda: (
                    subprocess.run(ask, env=os.environ | environment, capture_output=True).returncode == 0
                ),
                60,
            )
        start("slurmctld", "-c")
        for node in NODES:
            start("slurmd", "-N", node)
        wait_for(lambda: slurm(environment, "sinfo", "--noheader", "--format=%t %D") == "idle 2", 30)
        yield environment
    finally:
        subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=os.environ | environment)
        time.sleep(2)
        for name in (*NODES, "slurmctld", "slurmdbd", "munge"):
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
