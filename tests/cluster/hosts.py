"""Hosts that are namespaces: what a machine of its own has, without machines.

Each host has a network of its own (its address, its loopback) behind a virtual switch, its own processes, host name,
/tmp, /dev/shm and home folder, and an SSH server in place of an init system. Only the rest of the disk is the same:
that is where Python and this checkout lie. A link can be cut, a host be killed. Needs root, `ip`, `unshare`,
`nsenter`, `sshd` and `rsync`.

Knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "sshd", "rsync", "ssh", "ssh-keygen")
#: Where the environment of the tests lies; every host sees it.
PYTHON = Path(sys.executable)

_SUBNET = "10.77.0"
_HOME = Path.home()

# Runs as the first process of a host. Folders that are needed and lie in one that gets covered are kept.
_BOOT = """
set -eu
mount -t tmpfs -o mode=755 tmpfs /mnt
number=0
for folder in $KEEP; do
    mkdir -p /mnt/keep/$number
    mount --rbind $folder /mnt/keep/$number
    number=$((number + 1))
done
for folder in /tmp /run $HOME; do
    mount -t tmpfs -o mode=1777 tmpfs $folder
done
chmod 700 $HOME
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
number=0
for folder in $KEEP; do
    mkdir -p $folder
    mount --rbind /mnt/keep/$number $folder
    number=$((number + 1))
done
hostname $NAME
mkdir -p /run/sshd $HOME/.ssh
chmod 700 $HOME/.ssh
cp $WORK/key.pub $HOME/.ssh/authorized_keys
cp /etc/skel/.bashrc $HOME/.bashrc 2> /dev/null || true
cp /etc/skel/.profile $HOME/.profile 2> /dev/null || true
# What a login would set.
unset KEEP WORK
export SHELL=/bin/bash USER=root LOGNAME=root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec $(command -v sshd) -D -e -f $SSHD_CONFIG
"""

_SSHD_CONFIG = """
HostKey {work}/host_key
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
Subsystem sftp internal-sftp
PidFile none
"""


def missing() -> list[str]:
    """What this machine lacks for hosts, in words; empty where all is there."""
    lacking = [f"the program {name}" for name in TOOLS if shutil.which(name, path=_PATH) is None]
    if os.geteuid() != 0:
        lacking.append("root")
    elif not lacking:
        probe = ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "true"]
        if subprocess.run(probe, capture_output=True).returncode:
            lacking.append("the right to make namespaces")
    return lacking


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PATH": _PATH})
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))}: {done.stdout}{done.stderr}")


@dataclass
class Host:
    """One host. ``pid`` is its first process as the machine sees it."""

    name: str
    namespace: str
    address: str
    link: str
    """The switch's end of its cable."""
    switch: str
    process: subprocess.Popen[bytes]
    pid: int

    def command(self, words: Sequence[object], *, environment: Mapping[str, str] | None = None) -> list[str]:
        """A command as it has to be started to run on this host, in its home folder, with PYTHON's programs in PATH."""
        told = {
            "HOME": str(_HOME), "USER": "root", "LOGNAME": "root", "SHELL": "/bin/bash", "LANG": "C.UTF-8",
            "PATH": f"{PYTHON.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        } | dict(environment or {})
        enter = ["nsenter", f"--target={self.pid}", "--net", "--pid", "--mount", "--uts", "--ipc"]
        assignments = [f"{name}={value}" for name, value in told.items()]
        return [*enter, "env", "-i", f"--chdir={_HOME}", *assignments, *map(str, words)]

    def run(
        self, *words: object, environment: Mapping[str, str] | None = None, timeout: float = 1200, check: bool = True,
        directory: str | os.PathLike[str] | None = None, data: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. ``directory`` is its working folder, ``data`` its input."""
        if directory is not None:
            words = ("bash", "-c", 'cd "$0" && exec "$@"', str(directory), *words)
        done = subprocess.run(
            self.command(words, environment=environment), capture_output=True, text=True, timeout=timeout, input=data,
            **({} if data is not None else {"stdin": subprocess.DEVNULL}),  # type: ignore[call-overload]
        )
        if check and done.returncode:
            told = f"{shlex.join(map(str, words))}: {done.returncode}\n{done.stdout}{done.stderr}"
            raise RuntimeError(f"{self.name}: {told}")
        return done

    def write(self, path: str, text: str, mode: str = "600") -> None:
        """Write a file on this host."""
        self.run("bash", "-c", f'umask 077; mkdir -p "$(dirname {path})"; cat > {path}; chmod {mode} {path}', data=text)

    def read(self, path: str) -> str:
        return self.run("bash", "-c", f"cat {path}").stdout

    def cut(self) -> None:
        """Pull the cable."""
        _run("ip", "-n", self.switch, "link", "set", self.link, "down")

    def mend(self) -> None:
        _run("ip", "-n", self.switch, "link", "set", self.link, "up")

    def kill(self) -> None:
        """Power off: every process of the host at once, and its cable."""
        self.cut()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Network:
    """Hosts on one switch, and the keys that let each into the others."""

    work: Path
    prefix: str
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def switch(self) -> str:
        return f"{self.prefix}-switch"

    def add(self, name: str) -> Host:
        """Start a host; it answers to SSH when this returns."""
        number = len(self.hosts) + 10
        namespace, link = f"{self.prefix}-{name}", f"to-{name}"
        address = f"{_SUBNET}.{number}"
        _run("ip", "netns", "add", namespace)
        _run(
            "ip", "link", "add", link, "netns", self.switch, "type", "veth", "peer", "name", "eth0", "netns", namespace
        )
        _run("ip", "-n", self.switch, "link", "set", link, "master", "switch", "up")
        _run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        _run("ip", "-n", namespace, "link", "set", "lo", "up")
        _run("ip", "-n", namespace, "link", "set", "eth0", "up")
        # Programs ask for the way to the world to learn their own address.
        _run("ip", "-n", namespace, "route", "add", "default", "via", f"{_SUBNET}.1")
        environment = {
            "PATH": _PATH, "HOME": str(_HOME), "NAME": name, "WORK": str(self.work), "LANG": "C.UTF-8",
            "KEEP": " ".join(shlex.quote(str(folder)) for folder in self._kept()),
            "SSHD_CONFIG": str(self.work / "sshd_config"),
        }
        with open(self.work / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                [
                    # Nothing of it outlives the tests, however these end.
                    "setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", namespace, "unshare", "--pid", "--fork",
                    "--kill-child", "--mount", "--uts", "--ipc", "--mount-proc", "bash", "-c", _BOOT,
                ],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )
        self.hosts[name] = host = Host(name, namespace, address, link, self.switch, process, pid=0)
        deadline = time.monotonic() + 30
        while True:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if children:
                host.pid = int(children[0])
                is_up = subprocess.run(
                    host.command(["bash", "-c", f"exec 3<>/dev/tcp/{address}/22"]), capture_output=True
                )
                if is_up.returncode == 0 and host.run("hostname", check=False).stdout.strip() == name:
                    return host
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not start: {(self.work / f'{name}.log').read_text()}")
            time.sleep(0.05)

    def _kept(self) -> list[Path]:
        """Folders that have to be seen although they may lie in a home folder or in /tmp."""
        wanted = [self.work, REPOSITORY, Path(sys.base_prefix), Path(sys.prefix).resolve()]
        covered = (Path("/tmp"), Path("/run"), _HOME)
        return [folder for folder in wanted if any(folder.is_relative_to(cover) for cover in covered)]


@contextlib.contextmanager
def network(work: Path) -> Iterator[Network]:
    """A switch, for hosts to be added to; all of them end with it. ``work`` is a folder that every host will see."""
    found = Network(work, f"qa{os.getpid()}")
    for name in ("key", "host_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", work / name)
    (work / "sshd_config").write_text(_SSHD_CONFIG.format(work=work))
    try:
        _run("ip", "netns", "add", found.switch)
        _run("ip", "-n", found.switch, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", found.switch, "link", "set", "switch", "up")
        yield found
    finally:
        for host in found.hosts.values():
            if host.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(host.pid, signal.SIGKILL)
            host.process.kill()
            host.process.wait()
        for name in [*(host.namespace for host in found.hosts.values()), found.switch]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
