"""The Ray cluster: connecting to it, what it has, and what a run takes of it.

Knows nothing of rows, models or parts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.exceptions import RayError, UserCodeException
from ray.train import ScalingConfig

from ray_qa import room
from ray_qa.errors import OptionError, RayQAError, WorkError

T = TypeVar("T")

_NO_NODES = "the cluster has no node with CPUs or GPUs yet; say how many workers to wait for (--num-workers, --use-gpu)"

#: Workers in a row that may die while they start; more end the run.
MAX_INIT_DEATHS = 8

_EXCEPTION_LINE = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt|Died)\w*: .+$", re.MULTILINE)

_COLOUR = re.compile(r"\x1b\[[\d;]*m")

logger = logging.getLogger("ray_qa")


def connect() -> None:
    """Connect to the cluster that RAY_ADDRESS or a running head names, else start one in this process.

    Does nothing where the program has called `ray.init` itself.
    """
    if not ray.is_initialized():
        # An address in the environment (as inside `ray job submit`) names the cluster; else a local one is started.
        dashboard = None if "RAY_ADDRESS" in os.environ else False
        with _own_sigterm():
            ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=dashboard)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A worker that is killed while it loads its model is replaced; one that raises tells of it at its first call.
    context.max_consecutive_actor_init_deaths = MAX_INIT_DEATHS
    # What fails there is raised here; Ray Data would print its whole stack first, twice.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


class _KnowsTheCluster(ExecutionCallback):
    """Lets a dataset's execution begin when it knows what the cluster has.

    It asks an actor and does not wait for the answer. What it takes for an answer holds for a second, and before the
    first one that is "no CPUs": one task at a time would run in that second.
    """

    #: Seconds to wait at most.
    PATIENCE = 2.0

    def before_execution_starts(self, executor: Any) -> None:
        # These are the executor's own; where another Ray has them no more, that second is lost again.
        with contextlib.suppress(AttributeError):
            until = time.monotonic() + self.PATIENCE
            while not executor._cluster_autoscaler.get_total_resources().cpu and time.monotonic() < until:
                time.sleep(0.002)
            executor._resource_manager._global_limits_last_update_time = 0


@contextlib.contextmanager
def data_context(*, target_max_block_size: int) -> Iterator[None]:
    """For datasets that are made inside: blocks of ``target_max_block_size`` bytes, and all CPUs at work at once."""
    context = ray.data.DataContext.get_current()
    size, callbacks = context.target_max_block_size, context.custom_execution_callback_classes
    context.target_max_block_size = target_max_block_size
    context.custom_execution_callback_classes = [*callbacks, _KnowsTheCluster]
    try:
        yield
    finally:
        context.target_max_block_size, context.custom_execution_callback_classes = size, callbacks


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep what the program does on SIGTERM: `ray.init` would put its own handler in place of it."""
    own = signal.getsignal(signal.SIGTERM)
    yield
    if callable(own) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, own)


@dataclass(frozen=True)
class Workers:
    """The workers of a prediction: ``num_workers`` processes of ``threads`` CPU threads, with or without a GPU."""

    num_workers: int
    use_gpu: bool
    threads: int

    @property
    def device(self) -> str:
        return "cuda" if self.use_gpu else "cpu"

    @property
    def each(self) -> dict[str, float]:
        """What one of them takes of the cluster."""
        return {"CPU": 1, "GPU": 1} if self.use_gpu else {"CPU": self.threads}

    def __str__(self) -> str:
        what = "GPU" if self.use_gpu else f"{self.threads}-thread CPU"
        return f"{self.num_workers} {what} worker{'s' if self.num_workers != 1 else ''}"


def num_gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def cpus_per_node() -> list[int]:
    """CPUs of every node that is alive and has any."""
    found = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return [cpus for cpus in found if cpus]


def workers_of(scaling: ScalingConfig) -> Workers:
    """What ``scaling`` says, in this module's words."""
    resources = scaling.resources_per_worker if isinstance(scaling.resources_per_worker, dict) else {}
    cpus = resources.get("CPU", 1)
    threads = max(1, int(cpus)) if isinstance(cpus, (int, float)) else 1
    return Workers(_most_workers(scaling), bool(scaling.use_gpu), threads)


def resolve_precision(precision: str, device: str) -> str:
    """"bf16" or "fp32", once for a run, from the hardware that its workers will have."""
    from ray_qa.model import resolve_precision as resolve

    if precision == "auto" and device == "cuda":
        # The driver may sit on a node without a GPU.
        return get(ray.remote(num_gpus=1, num_cpus=0)(lambda: resolve(precision, device)).remote())
    return resolve(precision, device)


def prediction_workers(
    scaling: ScalingConfig | None, *, at_most: int, wait_seconds: float | None = None
) -> Workers:
    """Workers for prediction: as ``scaling`` says, else one per GPU, else one-thread workers on every CPU.

    One thread each measured faster than few workers with many threads, and makes a result independent of
    the machine's number of cores. ``at_most`` is the number of parts: more workers would stand idle. See `room.check`
    for ``wait_seconds``.

    Raises:
        OptionError: the cluster can never hold these workers, or it is for the caller to say which.
    """
    if scaling is None:
        _refuse_to_guess()
        gpus = num_gpus()
        found = Workers(max(1, min(gpus or sum(cpus_per_node()), at_most)), gpus > 0, 1)
    else:
        asked = workers_of(scaling)
        if asked.num_workers < 1:
            raise OptionError(f"num_workers is {asked.num_workers}; allowed for prediction: a whole number at least 1")
        found = Workers(max(1, min(asked.num_workers, at_most)), asked.use_gpu, asked.threads)
    room.check(found.num_workers, found.each, wait_seconds=wait_seconds)
    return found


def wait_for_one(workers: Workers, wait_seconds: float | None = None) -> None:
    """Wait until one worker of a prediction fits; the others join as they find room. See `room.wait`."""
    room.wait(1, workers.each, wait_seconds)


def wait_for_a_node(wait_seconds: float | None = None) -> None:
    """Wait until a node takes work, for steps that take any CPU that there is. See `room.wait`."""
    if not room.worker_nodes():
        room.check(1, {"CPU": 1}, wait_seconds=wait_seconds)
        room.wait(1, {"CPU": 1}, wait_seconds)


def _refuse_to_guess() -> None:
    """Nobody said which workers: refuse where the nodes that are there do not tell."""
    more = room.growth()
    if more is not None and more.has("GPU") and not num_gpus():
        raise OptionError(
            "the cluster has no GPU yet, and its autoscaler may add some: say which workers to wait for; allowed: "
            "--num-workers N --use-gpu, or --num-workers N for CPUs"
        )
    if not room.worker_nodes():
        raise OptionError(_NO_NODES)


def _most_workers(scaling: ScalingConfig) -> int:
    """``num_workers``, or the larger end of an elastic range."""
    count = scaling.num_workers
    if isinstance(count, tuple):
        count = count[1]
    return count if isinstance(count, int) else 0


def scaling_of(
    num_workers: int | None, *, use_gpu: bool = False, cpus_per_worker: int | None = None,
    min_workers: int | None = None,
) -> ScalingConfig | None:
    """The workers that a job's flags ask for; None where they say nothing. ``min_workers`` makes a range of them.

    Raises:
        OptionError: no worker would fit.
    """
    if num_workers is None and not use_gpu and cpus_per_worker is None and min_workers is None:
        return None
    connect()
    if num_workers is None:
        num_workers = num_gpus() if use_gpu else sum(cpus // (cpus_per_worker or 1) for cpus in cpus_per_node())
    if num_workers < 1:
        raise OptionError(
            f"num_workers is {num_workers}; allowed: at least 1 (the cluster has {num_gpus()} GPUs, and nodes of "
            f"{cpus_per_node()} CPUs; where nodes are still to be added, say how many workers to wait for)"
        )
    if min_workers is not None and not 1 <= min_workers <= num_workers:
        raise OptionError(f"min_workers is {min_workers}; allowed: 1 to num_workers, which is {num_workers}")
    wanted = {"CPU": cpus_per_worker, "GPU": 1 if use_gpu else None}
    resources = {name: float(count) for name, count in wanted.items() if count is not None}
    return ScalingConfig(
        num_workers=num_workers if min_workers is None else (min_workers, num_workers),  # type: ignore[arg-type]
        use_gpu=use_gpu, resources_per_worker=resources or None,
    )


def training_scaling(scaling: ScalingConfig | None, *, wait_seconds: float | None = None) -> ScalingConfig:
    """``scaling``, else one worker per GPU, else one worker per node with all the node's CPUs.

    Raises:
        OptionError: the cluster can never hold these workers, or it is for the caller to say which.
    """
    if scaling is None:
        _refuse_to_guess()
        gpus, cpus = num_gpus(), cpus_per_node()
        if gpus:
            scaling = ScalingConfig(num_workers=gpus, use_gpu=True)
        else:
            scaling = ScalingConfig(num_workers=len(cpus), resources_per_worker={"CPU": min(cpus)})
    count, worker = _fewest(scaling)
    room.check(count, worker, wait_seconds=wait_seconds)
    return scaling


def wait_for_all(scaling: ScalingConfig, wait_seconds: float | None = None) -> None:
    """Wait until all workers of a training fit: they start together or not at all. See `room.wait`."""
    count, worker = _fewest(scaling)
    strategy = scaling.placement_strategy
    room.wait(count, worker, wait_seconds, strategy=strategy if isinstance(strategy, str) else "PACK")


def _fewest(scaling: ScalingConfig) -> tuple[int, dict[str, float]]:
    """The workers that a training cannot do without, and what each takes."""
    fewest = scaling.num_workers[0] if isinstance(scaling.num_workers, tuple) else scaling.num_workers
    resources: Any = scaling.resources_per_worker or ({"GPU": 1} if scaling.use_gpu else {"CPU": 1})
    return (fewest, dict(resources)) if isinstance(fewest, int) and isinstance(resources, dict) else (0, {})


def get(reference: ray.ObjectRef[T]) -> T:
    """`ray.get` that raises ray_qa's own errors as themselves."""
    try:
        return ray.get(reference)
    except RayError as error:
        raise own_error(error) from error


def batches(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """The blocks of a dataset as they come, raising ray_qa's own errors as themselves."""
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="numpy")
    except (RayError, UserCodeException) as error:
        raise own_error(error) from error


def own_error(error: BaseException) -> BaseException:
    """The ray_qa error that a worker raised, found under what Ray wrapped it in; else a WorkError."""
    root = error
    while True:
        # A RayTaskError is made to look like its cause, with a traceback for a message: look at the cause first.
        inner = getattr(root, "cause", None) or root.__cause__
        if not isinstance(inner, BaseException):
            break
        root = inner
    if isinstance(root, RayQAError):
        return root
    # Ray Data may hide the cause in the text of the remote traceback.
    return WorkError(f"a worker failed: {last_error(f'{type(root).__name__}: {root}', str(error))}")


def last_error(*texts: str) -> str:
    """The last line of the texts that names an exception; the last text where none does."""
    lines = _EXCEPTION_LINE.findall(_COLOUR.sub("", "\n".join(texts)))
    named = [line for line in lines if "UserCode" not in line]
    return named[-1] if named else texts[-1]


def pack(value: Any) -> bytes:
    """A small Python object as one cell of a dataset."""
    return pickle.dumps(value)


def unpack(cell: bytes) -> Any:
    return pickle.loads(cell)
