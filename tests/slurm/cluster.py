"""A SLURM of two virtual nodes on this machine, for tests; needs `apt-get install slurm-wlm munge`, and no systemd.

    python tests/slurm/cluster.py start          then: source /tmp/dit-slurm/env.sh; sinfo
    python tests/slurm/cluster.py kill node2     its power fails: slurmd and all processes of its jobs are gone
    python tests/slurm/cluster.py boot node2     and it comes back
    python tests/slurm/cluster.py stop

As root each node has process, host name and mount namespaces of its own. Without, nodes stand side by side: their names
do not resolve, and `kill` ends their slurmd alone. Nothing is written outside the folder (--root).
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from getpass import getuser
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
UNSHARE = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"

CONFIGURATION = """\
ClusterName=dit
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
FirstJobId={first_job}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for cred_expire + 1 s; 5 is the least.
AuthInfo=socket={root}/run/munge.socket,cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
PropagateResourceLimits=NONE
MailProg=/bin/true
# React at once, and believe this file rather than the hardware.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
# A job in `high` has jobs in `main` requeued, after the signal of their --signal and GraceTime.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
# A node that is silent for SlurmdTimeout is looked for, and noticed as lost after about 2.5 times as long.
SlurmdTimeout=5
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=10
UnkillableStepTimeout=15
ReturnToService=1
MinJobAge=86400
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""

# The first process of a node: reaps orphans, as it is their pid 1, and dies with slurmd.
NODE = """
    hostname "$2"; mount --bind "$1/etc/hosts" /etc/hosts
    slurmd -D -N "$2" & daemon=$!
    trap "kill -TERM $daemon 2>/dev/null" TERM INT
    while kill -0 $daemon 2>/dev/null; do wait $daemon || true; done
"""


class Cluster:
    """Nodes `node1` and so on, of 8 imagined CPUs and 2 imagined GPUs each, in partitions `main` and `high`."""

    def __init__(self, root: Path, num_nodes: int = 2):
        self.root = root.absolute()
        self.names = [f"node{i + 1}" for i in range(num_nodes)]
        self.conf = self.root / "etc" / "slurm.conf"
        path = f"{os.environ.get('PATH', '/usr/bin:/bin')}:{SBIN}"
        self.env = {**os.environ, "PATH": path, "SLURM_CONF": str(self.conf)}
        self._daemon_env = {"PATH": f"/usr/bin:/bin:{SBIN}", "LANG": "C.UTF-8", "SLURM_CONF": str(self.conf)}

    @staticmethod
    def missing() -> list[str]:
        """Programs that are not installed."""
        return [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}")]

    @property
    def namespaces(self) -> bool:
        """Whether nodes have their own, so that their power can fail."""
        return (self.root / "namespaces").exists()

    def run(self, *command: str, **options) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run(command, env=self.env, text=True, capture_output=True, timeout=60, **options)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
        return done.stdout.strip()

    @property
    def ready(self) -> bool:
        """Whether all nodes answer."""
        try:
            states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()
        except (RuntimeError, subprocess.TimeoutExpired, FileNotFoundError):
            return False
        return len(states) == len(self.names) and all(s in ("idle", "mixed", "allocated", "completing") for s in states)

    def start(self) -> None:
        """Start it from nothing, or leave one that is up as it is."""
        if missing := self.missing():
            raise RuntimeError(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
        if self.conf.exists() and self.ready:
            return
        self.stop()
        shutil.rmtree(self.root, ignore_errors=True)
        for name in ("etc", "state", "spool", "log", "run", "dev"):
            (self.root / name).mkdir(parents=True)
        if not subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
            (self.root / "namespaces").touch()
        self._configure()
        run = self.root / "run"
        self._begin(
            "munged",
            "--force",
            f"--key-file={self.root}/etc/munge.key",
            f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.pid",
            f"--log-file={self.root}/log/munged.log",
            f"--seed-file={run}/munged.seed",
        ).wait()
        self._begin("slurmctld", "-c").wait()
        for name in self.names:
            self.boot(name)
        until = time.monotonic() + 60
        while not self.ready:
            if time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"SLURM did not start: see {self.root}/log")
            time.sleep(0.1)

    def stop(self) -> None:
        """Cancel its jobs and end its processes."""
        if self.conf.exists():
            subprocess.run(["scancel", "-u", getuser()], env=self.env, capture_output=True, timeout=60)
            until = time.monotonic() + 10
            while time.monotonic() < until and self.ready and self.run("squeue", "-h"):
                time.sleep(0.2)
        for signum in (signal.SIGTERM, signal.SIGKILL):
            for pid in self._processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
            until = time.monotonic() + 5
            while self._processes() and time.monotonic() < until:
                time.sleep(0.1)

    def kill(self, name: str) -> None:
        """A node's power fails; without namespaces its slurmd ends, and no more."""
        for pid, words in self._processes().items():
            first = words[0] == "bash" and f"node-init:{name}" in words  # the rest of the node goes with it
            if first or (not self.namespaces and words[-2:] == ["-N", name]):
                os.kill(pid, signal.SIGKILL)

    def boot(self, name: str) -> None:
        """Start a node."""
        (self.root / "spool" / name).mkdir(exist_ok=True)
        if self.namespaces:
            self._begin(*UNSHARE, "bash", "-c", NODE, f"node-init:{name}", str(self.root), name)
        else:
            self._begin("slurmd", "-D", "-N", name)

    def _begin(self, *command: str) -> subprocess.Popen:
        """A daemon, which holds nothing of ours."""
        null = subprocess.DEVNULL
        path = shutil.which(command[0], path=self._daemon_env["PATH"])
        return subprocess.Popen(
            [path, *command[1:]],
            env=self._daemon_env,
            cwd="/",
            stdin=null,
            stdout=null,
            stderr=null,
            start_new_session=True,
        )

    def _processes(self) -> dict[int, list[str]]:
        """Daemons and nodes of this cluster that are alive, with their command lines."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                name, words = (folder / "comm").read_text().strip(), _split(folder / "cmdline")
                env, state = _split(folder / "environ"), (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # it has ended, or is another's
                continue
            node = any(word.startswith("node-init:") for word in words) and str(self.root) in words
            daemon = name.startswith(("slurm", "munged")) and (
                f"SLURM_CONF={self.conf}" in env or any(f"{self.root}/" in word for word in words)
            )
            if state != "Z" and (node or daemon):
                found[int(folder.name)] = words
        return found

    def _configure(self) -> None:
        host, etc = socket.gethostname().partition(".")[0], self.root / "etc"
        port = _free_ports(len(self.names) + 1)
        key = etc / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        nodes, hosts = [], ["127.0.0.1 localhost", f"127.0.0.1 {host}"]
        for i, name in enumerate(self.names):
            address = f"127.0.1.{11 + i}" if self.namespaces else "127.0.0.1"
            hosts.append(f"{address} {name}")
            nodes.append(
                f"NodeName={name} NodeHostname={name if self.namespaces else host} NodeAddr={address} "
                f"Port={port + 1 + i} CPUs=8 RealMemory=64000 Gres=gpu:2 State=UNKNOWN"
            )
        (etc / "hosts").write_text("\n".join(hosts) + "\n")
        for i in range(2):
            (self.root / "dev" / f"gpu{i}").symlink_to("/dev/null")  # SLURM wants character devices
        (etc / "gres.conf").write_text(f"Name=gpu File={self.root}/dev/gpu[0-1]\n")
        # Job ids differ from those of an earlier cluster, as logs are named by them.
        first, user = int(time.time()) % 60_000_000 + 1, getuser()
        self.conf.write_text(
            CONFIGURATION.format(
                host=host, user=user, first_job=first, root=self.root, port=port, nodes="\n".join(nodes)
            )
        )
        (self.root / "env.sh").write_text(f"export SLURM_CONF={self.conf}\n")


def _split(path: Path) -> list[str]:
    """Words or variables of a process, of a file in /proc."""
    return path.read_bytes().decode(errors="replace").rstrip("\0").split("\0")


def _free_ports(number: int) -> int:
    """The first of so many ports in a row that nobody listens at."""
    for first in range(26800, 32000, 10):
        try:
            for port in range(first, first + number):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports between 26800 and 32000")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["start", "stop", "kill", "boot"])
    parser.add_argument("node", nargs="?", help="for kill and boot")
    parser.add_argument("--root", type=Path, default=Path("/tmp/dit-slurm"))
    options = parser.parse_args()
    cluster = Cluster(options.root)
    if options.action in ("kill", "boot"):
        if options.node not in cluster.names:
            parser.error(f"name one of {', '.join(cluster.names)}")
        getattr(cluster, options.action)(options.node)
    else:
        getattr(cluster, options.action)()
    if options.action == "start":
        print(f"up: source {cluster.root}/env.sh")


if __name__ == "__main__":
    main()
