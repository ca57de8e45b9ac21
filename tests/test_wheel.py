"""The wheel in a clean environment, as a stranger installs it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ray_qa
from tests.conftest import REPOSITORY


def run(*command: object, cwd: Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder]
    run(*build, REPOSITORY, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


def test_what_is_in_it(wheel: Path) -> None:
    assert wheel.name == f"ray_qa-{ray_qa.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        entry_points = opened.read(f"ray_qa-{ray_qa.__version__}.dist-info/entry_points.txt").decode()
        metadata = opened.read(f"ray_qa-{ray_qa.__version__}.dist-info/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {"ray_qa", f"ray_qa-{ray_qa.__version__}.dist-info"}
    assert "ray_qa/py.typed" in names and "ray-qa = ray_qa.cli:main" in entry_points
    modules = {f"ray_qa/{file.name}" for file in (REPOSITORY / "ray_qa").glob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Dist: ray[data,default,train]>=2.56" in metadata


def test_the_changelog_has_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == ray_qa.__version__
    assert versions == sorted(versions, key=lambda text: [int(part) for part in text.split(".")], reverse=True)


@pytest.mark.slow
def test_it_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """Installed with all that it asks for, and nothing of this checkout in sight."""
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    constraints = REPOSITORY / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel, cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    help_text = run(tmp_path / "env" / "bin" / "ray-qa", "--help", cwd=tmp_path)
    assert all(job in help_text for job in ("train", "eval", "test", "prepare"))
    program = (
        "import importlib.util, ray_qa, sys\n"
        "assert ray_qa.__file__.startswith(sys.prefix), ray_qa.__file__\n"
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules\n"
        "for name in ray_qa.__all__: getattr(ray_qa, name)\n"
        "for name in ('jobs', 'examples', 'tests', 'deploy', 'benchmarks'):\n"
        "    assert importlib.util.find_spec(name) is None, name\n"
        "print(ray_qa.__version__)\n"
    )
    assert run(python, "-c", program, cwd=tmp_path).strip() == ray_qa.__version__
    # Types reach whoever uses it.
    (tmp_path / "user.py").write_text("import ray_qa\nray_qa.read_csv(7)\nreveal_type(ray_qa.open_results('x'))\n")
    mypy = [sys.executable, "-m", "mypy", "--python-executable", python, "--follow-imports=silent", "user.py"]
    told = subprocess.run([str(word) for word in mypy], capture_output=True, text=True, cwd=tmp_path).stdout
    assert 'incompatible type "int"' in told and "Answers" in told, told
