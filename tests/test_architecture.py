"""The rules of the house: who may import whom, what an import costs, what the package exports."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

import ray_qa

REPOSITORY = Path(__file__).resolve().parents[1]
MODULES = {path.stem for path in (REPOSITORY / "ray_qa").glob("*.py")} - {"__init__"}
HEAVY = ("torch", "transformers", "ray", "datasets", "pandas")

PUBLIC = [
    "ARGS_QA_TRAIN",
    "EvalResult",
    "HappyQuestionAnswering",
    "QAEvalArgs",
    "QATestArgs",
    "QATrainArgs",
    "QuestionAnsweringResult",
    "RayQAError",
    "UserError",
    "compare",
    "evaluate",
    "open_results",
    "predict",
    "read_csv",
    "train",
]


def imported_by(statement: str) -> set[str]:
    """The heavy libraries that a fresh interpreter has loaded after ``statement``."""
    script = f"{statement}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return set(ast.literal_eval(done.stdout))


@pytest.mark.parametrize(
    "name",
    ["errors", "options", "schema", "storage", "parquet_files"]
    + ["csv_file", "csv_scan", "csv_parse", "csv_index"]
    + ["labels", "windows", "batches", "spans", "metrics", "golds", "slices", "comparison", "calibration", "report"]
    + ["results", "folder_lock", "progress", "held_out", "journal", "reporters", "model_card", "hub"]
    + ["cli"],
)
def test_import_of_module_is_light(name: str) -> None:
    assert imported_by(f"import ray_qa.{name}") == set()


def test_import_of_package_is_light() -> None:
    assert imported_by("import ray_qa") == set()


def test_import_is_measured() -> None:
    """The probe sees what it looks for."""
    assert "torch" in imported_by("import torch")


def test_public_names_are_pinned() -> None:
    assert sorted(ray_qa.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(ray_qa))


def test_public_names_are_no_modules_and_stay_so() -> None:
    """A lazily exported function would turn into the module of its name once that is imported."""
    assert MODULES.isdisjoint(ray_qa.__all__)
    for module in sorted(MODULES):
        importlib.import_module(f"ray_qa.{module}")
    for name in ray_qa.__all__:
        assert not isinstance(getattr(ray_qa, name), types.ModuleType)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ray_qa.no_such_name  # type: ignore[attr-defined]


def test_import_contracts_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_jobs_are_shims() -> None:
    """jobs/ holds nothing but calls of ray_qa.cli."""
    shims = sorted((REPOSITORY / "jobs").glob("*.py"))
    assert {"train", "eval", "test"} <= {shim.stem for shim in shims}
    for shim in shims:
        tree = ast.parse(shim.read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        modules = {node.module for node in imports if isinstance(node, ast.ImportFrom)}
        assert modules <= {"ray_qa.cli", "__future__"}, shim.name
        assert not [node for node in imports if isinstance(node, ast.Import) if node.names[0].name != "sys"]
        assert len(tree.body) <= 5, shim.name
