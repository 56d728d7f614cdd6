"""A real SLURM of fake nodes on this one machine, for the tests: `with Cluster(folder) as cluster`.

slurmctld, one slurmd a node and munged run as root, each node on a port of its own, with files in the place of
GPUs. Needs Debian's slurm-wlm and munge; no systemd, no database.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        return f"SLURM is not installed (no {', '.join(absent)}): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "a cluster of fake nodes needs root"


def _program(name: str) -> str | None:
    # Daemons lie in sbin, which is not on everybody's path.
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    for first in range(16000, 19000, 50):
        held = []
        try:
            for port in range(first, first + count):
                held.append(socket.create_server(("127.0.0.1", port)))
        except OSError:
            continue
        else:
            return first
        finally:
            for one in held:
                one.close()
    raise RuntimeError(f"no {count} free ports in a row")


class Cluster:
    """`nodes` fake nodes n0, n1, ... with `cpus` cores and `gpus` GPUs each, all of them this machine."""

    def __init__(self, folder: Path, nodes: int = 4, cpus: int = 4, gpus: int = 4) -> None:
        self.folder, self.nodes, self.cpus, self.gpus = folder, nodes, cpus, gpus
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in [key for key in self.environment if key.startswith(("SLURM_J", "SLURM_N", "SLURM_P"))]:
            del self.environment[name]

    def __enter__(self) -> "Cluster":
        for name in ("state", "log", "run", *(f"spool/n{i}" for i in range(self.nodes))):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        port = _free_ports(self.nodes + 1)
        (self.folder / "slurm.conf").write_text(self._configuration(port))
        devices = self.folder / f"gpu[0-{self.gpus - 1}]"
        for i in range(self.gpus):
            (self.folder / f"gpu{i}").touch()
        names = f"n[0-{self.nodes - 1}]"
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName={names} Name=gpu File={devices}\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _configuration(self, port: int) -> str:
        host, run = socket.gethostname().split(".")[0], self.folder / "run"
        settings = {
            "ClusterName": "fake",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "SlurmctldPort": port,
            "SlurmctldPidFile": run / "slurmctld.pid",
            "SlurmdPidFile": run / "slurmd.%n.pid",
            "SlurmctldLogFile": self.folder / "log/slurmctld.log",
            "SlurmdLogFile": self.folder / "log/slurmd.%n.log",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool/%n",
            "AuthType": "auth/munge",
            "CryptoType": "crypto/munge",
            # Short-lived credentials: a requeued job waits until those of its last start have expired.
            "AuthInfo": f"socket={run}/munge.socket,cred_expire=5",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0",
            "SlurmdParameters": "config_overrides",
            "MpiDefault": "none",
            "ReturnToService": 2,
            "JobRequeue": 1,
            "KillWait": 5,
            "InactiveLimit": 0,
            "MinJobAge": 3600,
            "SlurmctldTimeout": 30,
            "SlurmdTimeout": 60,
            "MessageTimeout": 60,
            "GresTypes": "gpu",
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        for i in range(self.nodes):
            lines.append(
                f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 1 + i} CPUs={self.cpus} Boards=1"
                f" SocketsPerBoard=1 CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory=8000"
                f" Gres=gpu:{self.gpus} State=UNKNOWN"
            )
        lines.append(
            f"PartitionName=main Nodes=n[0-{self.nodes - 1}] Default=YES MaxTime=1-0 DefaultTime=10 State=UP"
        )
        return "\n".join(lines) + "\n"

    def _start(self) -> None:
        run = self.folder / "run"
        self._daemon(
            "munged", "--force", f"--key-file={self.folder}/munge.key", f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.pid", f"--log-file={self.folder}/log/munged.log",
            f"--seed-file={run}/munged.seed", "--num-threads=2",
        )  # fmt: skip
        self._daemon("slurmctld", "-c")
        for i in range(self.nodes):
            self._daemon("slurmd", "-N", f"n{i}")
        self.wait_idle()

    def _daemon(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            [_program(name), *arguments], env=self.environment, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr}")

    def wait_idle(self, seconds: float = 60) -> None:
        """Until every node is idle."""
        end = time.monotonic() + seconds
        while True:
            idle = self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%n", check=False).split()
            if len(idle) == self.nodes:
                return
            if time.monotonic() > end:
                raise RuntimeError(f"idle nodes: {idle}\n{self.call('sinfo', '-N', '-l', check=False)}")
            time.sleep(0.25)

    def call(self, *command: str, check: bool = True, cwd: Path | None = None, timeout: float = 280) -> str:
        """Runs a command that sees this cluster and gives its output. RuntimeError, with all of it, on failure."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, cwd=cwd
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        text = self.call("scontrol", "show", "job", "-o", number)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def wait_job(self, number: str, states: tuple[str, ...], seconds: float = 200) -> dict[str, str]:
        """Until the job is in one of the states; gives what is known of it then."""
        end = time.monotonic() + seconds
        while (facts := self.job(number))["JobState"] not in states:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"job {number} is {facts['JobState']} ({facts.get('Reason')}), not {states}"
                )
            time.sleep(0.3)
        return facts

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--me"], env=self.environment, capture_output=True, timeout=60)
        end = time.monotonic() + 20
        while self.call("squeue", "-h", check=False).strip() and time.monotonic() < end:
            time.sleep(0.2)  # or their processes outlive the daemons
        daemons = []
        for file in (self.folder / "run").glob("*.pid"):
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                daemons.append(psutil.Process(int(file.read_text())))
                daemons[-1].terminate()
        end = time.monotonic() + 10
        while any(map(_alive, daemons)):
            if time.monotonic() > end:
                raise RuntimeError(f"left behind: {daemons}")
            time.sleep(0.05)


def _alive(process: psutil.Process) -> bool:
    # In a container nobody may collect the daemons, which stay behind as zombies.
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
