"""The repository's cluster.yaml on the hosts of `hosts`: what is changed for it, and a cluster that is up.

Knows nothing of jobs.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.hosts import PYTHON, REPOSITORY, Host, network

BUCKET = "ray-qa"
#: Of the store; a host that has them nowhere on its disk must get them from the driver.
ACCESS_KEY, SECRET_KEY = "key-of-the-cluster", "secret-of-the-cluster"
DASHBOARD = "http://localhost:8265"


def local_variant(config: dict[str, Any], head: str, workers: Sequence[str], key: str) -> dict[str, Any]:
    """``config`` for machines that are there: provider ``local``, with addresses in place of types of instances.

    The hosts are offline, so they borrow the libraries of the tests' environment; ray_qa is built from the mounted
    source as on any other node. Everything else stays as it is: token, dashboard, mounts, the order of the commands.
    """
    config = {name: value for name, value in config.items() if name not in ("available_node_types", "head_node_type")}
    config["provider"] = {"type": "local", "head_ip": head, "worker_ips": list(workers)}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": key}
    config["max_workers"] = len(workers)
    borrowed = Path(sys.prefix).resolve() / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    environment = (
        f"{PYTHON.resolve()} -m venv --without-pip ~/ray_qa_env"
        f" && echo {borrowed} > $(echo ~/ray_qa_env/lib/python*/site-packages)/borrowed.pth"
        f" && {PYTHON} -m pip --python ~/ray_qa_env/bin/python install --quiet --no-index --no-deps"
        " --no-build-isolation --ignore-installed --no-warn-script-location ~/ray_qa_source"
        " && printf '#!/bin/sh\\nexec ~/ray_qa_env/bin/python -m ray.scripts.scripts \"$@\"\\n' > ~/ray_qa_env/bin/ray"
        " && chmod 755 ~/ray_qa_env/bin/ray"
    )
    (install,) = [line for line in config["setup_commands"] if "uv pip install" in line]
    config["setup_commands"] = [
        environment if line == install else line for line in config["setup_commands"] if "install.sh" not in line
    ]
    # Types of instances say what a node has; here Ray would count the machine's processors once for every host.
    for commands, count in (("head_start_ray_commands", 0), ("worker_start_ray_commands", 1)):
        stop, start = config[commands]
        start += f" --num-cpus={count} --object-store-memory=200000000"
        # A busy machine may take longer to start a node than the half minute that Ray waits for it.
        config[commands] = [stop, f"{start} || ({stop}; {start})"]
    return config


@dataclass
class LocalCluster:
    """A cluster that is up, and the laptop that jobs are submitted from. ``work`` has the logs."""

    work: Path
    laptop: Host
    head: Host
    workers: list[Host]
    store: Host
    token: str
    environment: dict[str, str]

    @property
    def endpoint(self) -> str:
        return f"http://{self.store.address}:5000"

    def ray(
        self, *words: object, timeout: float = 1200, check: bool = True, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """`ray ...` on the laptop, in its clone; ``more`` is set in its environment."""
        return self.laptop.run(
            "ray", *words, environment=self.environment | more, timeout=timeout, check=check, directory="clone"
        )

    def submit(
        self, name: str, *words: object, wait: bool = True, check: bool = True, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit` under a name, from the clone."""
        options = [*options, f"--submission-id={name}", *([] if wait else ["--no-wait"])]
        return self.ray("job", "submit", "--working-dir", ".", *options, "--", *words, check=check)

    def status(self, name: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        return str(self.info(name)["status"])

    def info(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.ask(f"/api/jobs/{name}")))

    def ask(self, path: str) -> str:
        """What the dashboard answers, through the tunnel and with the token."""
        code = (
            "import sys, urllib.request as web; url, token = sys.argv[1:];"
            "request = web.Request(url, headers={'Authorization': f'Bearer {token}'});"
            "print(web.urlopen(request, timeout=60).read().decode())"
        )
        return self.laptop.run("python", "-S", "-c", code, f"{DASHBOARD}{path}", self.token).stdout

    def logs(self, name: str) -> str:
        return self.ray("job", "logs", name).stdout

    def wait(self, name: str, seconds: float = 300) -> dict[str, Any]:
        """Wait until the job has ended."""
        for _ in patiently(seconds):
            info = self.info(name)
            if info["status"] not in ("PENDING", "RUNNING"):
                return info
        raise TimeoutError(f"{name} did not end in {seconds} s\n{self.logs(name)}")

    def nodes(self) -> dict[str, dict[str, float]]:
        """Address and resources of the nodes that are alive."""
        code = (
            "import json, ray; ray.init(address='auto', log_to_driver=False, logging_level='ERROR');"
            "print(json.dumps({n['NodeManagerAddress']: n['Resources'] for n in ray.nodes() if n['Alive']}))"
        )
        done = self.head.run("ray_qa_env/bin/python", "-c", code, environment={"RAY_AUTH_MODE": "token"}, check=False)
        return {} if done.returncode else dict(json.loads(done.stdout.splitlines()[-1]))

    def wait_for_nodes(self, addresses: Sequence[str], seconds: float = 240) -> None:
        """Wait until the nodes with these addresses and no others are alive."""
        for _ in patiently(seconds):
            found = self.nodes()
            if set(found) == set(addresses):
                return
        log = self.head.run("bash", "-c", "tail -n 60 /tmp/ray/session_latest/logs/monitor*", check=False)
        raise TimeoutError(f"{sorted(found)} are there instead of {sorted(addresses)}\n{log.stdout}")


@contextlib.contextmanager
def local_cluster(work: Path) -> Iterator[LocalCluster]:
    """Head, two workers, laptop and store; `ray up` has run on the laptop, and its tunnel to the head stands."""
    with network(work) as found, contextlib.ExitStack() as stack:
        names = ("laptop", "head", "worker-1", "worker-2", "store")
        laptop, head, *workers, store = (found.add(name) for name in names)
        _start_store(store, work, stack)
        key = "~/.ssh/cluster_key"
        laptop.write(key, (work / "key").read_text())
        # As `git clone` would make it, with what is not committed yet.
        ours = ["--exclude=.git", "--exclude=.venv", "--filter=:- .gitignore"]
        laptop.run("rsync", "-a", *ours, f"{REPOSITORY}/", "clone")
        config = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
        variant = local_variant(config, head.address, [worker.address for worker in workers], key)
        laptop.write("~/clone/local-cluster.yaml", yaml.safe_dump(variant))
        laptop.run("ray", "get-auth-token", "--generate")
        token = laptop.read("~/.ray/auth_token").strip()
        laptop.run("bash", "-c", "chmod 600 ~/.ray/auth_token")
        environment = {
            "RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": DASHBOARD, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        }
        cluster = LocalCluster(work, laptop, head, workers, store, token, environment)
        # Where the drivers look for the store: on the head alone, as an instance profile would give it to a node.
        keys = f"aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
        head.write("~/.aws/credentials", f"[default]\n{keys}")
        # Ray's newer autoscaler takes the head of a `local` cluster for one of its workers, and starts one too few.
        done = cluster.ray(
            "up", "--yes", "--no-config-cache", "local-cluster.yaml", timeout=1200, RAY_UP_enable_autoscaler_v2="0"
        )
        (work / "ray-up.log").write_text(done.stdout + done.stderr)
        tunnel = stack.enter_context(background(laptop.command(
            ["bash", "-c", "cd clone && exec ray dashboard local-cluster.yaml"], environment=environment
        ), work / "tunnel.log"))
        for _ in patiently(120):
            if cluster.ray("job", "list", check=False).returncode == 0:
                break
            assert tunnel.poll() is None, (work / "tunnel.log").read_text()
        else:
            raise TimeoutError(f"no tunnel: {(work / 'tunnel.log').read_text()}")
        yield cluster


def patiently(seconds: float) -> Iterator[None]:
    """About once a second, for so many seconds of looking: a machine that stands still meanwhile does not count."""
    for _ in range(int(seconds)):
        yield
        time.sleep(1)


def _start_store(store: Host, work: Path, stack: contextlib.ExitStack) -> None:
    command = store.command(["python", "-m", "moto.server", "-H", store.address, "-p", "5000"])
    stack.enter_context(background(command, work / "store.log"))
    code = (
        "import boto3, sys, time\n"
        f"s3 = boto3.client('s3', endpoint_url='http://{store.address}:5000', region_name='us-east-1',"
        " aws_access_key_id='a', aws_secret_access_key='b')\n"
        "deadline = time.monotonic() + 60\n"
        "while True:\n"
        "    try:\n"
        f"        s3.create_bucket(Bucket={BUCKET!r}); break\n"
        "    except Exception:\n"
        "        if time.monotonic() > deadline: raise\n"
        "        time.sleep(0.3)\n"
    )
    store.run("python", "-c", code)


@contextlib.contextmanager
def background(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with open(log, "wb") as stream:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()


def main() -> None:
    """Bring a cluster up and keep it: ``python -m tests.cluster.local_cluster [FOLDER]``."""
    import tempfile

    work = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="ray_qa_cluster_"))
    work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts end too
    with local_cluster(work) as cluster:
        for host in (cluster.laptop, cluster.head, *cluster.workers, cluster.store):
            print(f"{host.name:10} {host.address:12} {shlex.join(host.command(['bash']))}", flush=True)
        print(f"logs: {work}; end it with Ctrl-C", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(10**6)


if __name__ == "__main__":
    main()
