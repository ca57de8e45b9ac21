"""What tests share: one Ray for the whole session, one tiny model, and the way to ../shared."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = REPOSITORY / "examples"
SHARED = REPOSITORY.parent / "shared"

# Before any test module imports a library that reads them. Ray's workers inherit both.
_HOME = tempfile.TemporaryDirectory(prefix="ray_qa_tests_")
os.environ["RAY_QA_HOME"] = _HOME.name
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where pytest-xdist runs several processes, one of them has the session's Ray and the jobs' head."""
    for item in items:
        if {"ray_session", "head"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("ray"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("shared"):
        _require_shared()


def _require_shared() -> None:
    if SHARED.is_dir():
        return
    missing = "../shared (data and models for tests, beside the checkout) is absent"
    if os.environ.get("CI"):
        pytest.fail(f"{missing}; in CI it has to be there", pytrace=False)
    pytest.skip(missing)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared; use it in tests that are marked ``shared``."""
    _require_shared()
    return SHARED


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray for the whole session: two CPUs at least, no dashboard, little to say."""
    import ray

    ray.init(
        address="local",
        num_cpus=max(2, os.cpu_count() or 2),
        include_dashboard=False,
        logging_level="WARNING",
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the untrained model of the examples. Read only: copy it to change it."""
    from examples.tiny_model import make_model

    folder = tmp_path_factory.mktemp("tiny_model")
    make_model(folder, EXAMPLES / "train.csv")
    return folder
