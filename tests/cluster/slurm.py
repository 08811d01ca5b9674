"""A real Slurm of one node on this machine, for tests: munge, slurmctld and slurmd on loopback.

    with slurm.running(folder) as environment:
        subprocess.run(["squeue"], env=environment)

It needs Debian's packages slurm-wlm and munge, and root. The daemons are those of this folder alone, and are stopped by
their own process ids. Snakemake hides SLURM_CONF from its jobs: the configuration is linked where Slurm looks for it.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
CPUS = 2
CONFIGURATION = Path("/etc/slurm/slurm.conf")


def missing() -> str:
    """Why it cannot be started here; empty if it can."""
    if CONFIGURATION.exists():
        return f"this machine has a Slurm of its own ({CONFIGURATION})"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=path())]
    if absent:
        return f"no Slurm here: {absent[0]} is missing (apt install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


def path() -> str:
    """Where its programs are."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """Start a cluster whose files are in a folder; yield the environment of its clients."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path()}
    _configure(folder)
    with contextlib.ExitStack() as stack:
        CONFIGURATION.parent.mkdir(parents=True, exist_ok=True)
        CONFIGURATION.symlink_to(folder / "slurm.conf")
        stack.callback(CONFIGURATION.unlink)
        _start_munge(folder, stack)
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", _node()]):
            _start(command, folder, environment, stack)
        _wait(environment, folder)
        try:
            yield environment
        finally:
            subprocess.run(["scancel", "--user", "root"], env=environment, check=False, capture_output=True)
            time.sleep(1)


def _node() -> str:
    return socket.gethostname().split(".")[0]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _configure(folder: Path) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir(exist_ok=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    lines = {
        "ClusterName": "test",
        "SlurmctldHost": f"{_node()}(127.0.0.1)",
        "SlurmUser": "root",
        "SlurmctldPort": _free_port(),
        "SlurmdPort": _free_port(),
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.socket",
        "CredType": "cred/munge",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU_Memory",
        "AccountingStorageType": "accounting_storage/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "ReturnToService": 2,
        "SchedulerParameters": "sched_interval=2,bf_interval=2",
        "KillWait": 5,
    }
    text = "".join(f"{name}={value}\n" for name, value in lines.items())
    text += f"NodeName={_node()} NodeAddr=127.0.0.1 CPUs={CPUS} RealMemory={memory} State=UNKNOWN\n"
    text += "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
    (folder / "slurm.conf").write_text(text)


def _start_munge(folder: Path, stack: contextlib.ExitStack) -> None:
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    command = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    command += [
        f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munged.seed",
    ]
    _start(command, folder, os.environ | {"PATH": path()}, stack)
    _until(lambda: (folder / "munge.socket").exists(), folder, "munged")


def _start(command: list[str], folder: Path, environment: dict, stack: contextlib.ExitStack) -> None:
    log = stack.enter_context((folder / f"{command[0]}.out").open("w"))
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    stack.callback(_stop, process)


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(environment: dict, folder: Path) -> None:
    def idle() -> bool:
        found = subprocess.run(
            ["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True, check=False
        )
        return found.stdout.strip() == "idle"

    _until(idle, folder, "slurm")


def _until(ready, folder: Path, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            logs = "\n".join(file.read_text()[-500:] for file in folder.glob("*.log"))
            raise RuntimeError(f"{what} did not start:\n{logs}")
        time.sleep(0.3)
