"""The commands as a shell sees them: exit codes, first and last lines, and what stands in the folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ray_qa import cli
from tests.conftest import REPOSITORY

GOOD = "context,question,answer_text,answer_start\nAnn has 3 keys.,who has 3 keys?,Ann,0\n"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, object], str]:
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]), err


@pytest.mark.usefixtures("ray_session")
def test_test_writes_parquet_and_one_json_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("context,question\nAnn has 3 keys.,who has 3 keys?\nAnn has 3 keys., \n")
    arguments = ("test", "--input", rows, "--model", tiny_model, "--output", tmp_path / "out")
    code, result, err = run(capsys, *arguments)
    assert code == 3 and result["status"] == "failed" and "max_error_rows" in str(result["error"])
    assert (result["num_rows"], result["num_errors"], result["output"]) == (2, 1, str(tmp_path / "out"))
    assert pq.read_table(tmp_path / "out")["row_index"].to_pylist() == [0, 1]
    code, result, err = run(capsys, *arguments, "--max-error-rows", "1")
    assert code == 0 and result["status"] == "done" and result["num_resumed_rows"] == 2

    verify = ("test", "--verify", tmp_path / "out")
    code, result, err = run(capsys, *verify)
    assert code == 0 and (result["job"], result["status"], result["num_rows"]) == ("test", "done", 2)
    part = tmp_path / "out" / "part-000000000000.parquet"
    part.write_bytes(part.read_bytes()[:-9] + b"x" * 9)
    code, result, err = run(capsys, *verify)
    assert code == 1 and "part-000000000000.parquet" in str(result["error"]) and "part-000000000000" in err
    code, result, err = run(capsys, "test", "--verify", tmp_path)
    assert code == 2 and "no finished results" in str(result["error"])


@pytest.mark.usefixtures("ray_session")
def test_what_users_get_wrong(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each mistake: exit code 2, nothing written, and the file, row, column, what was found and what is allowed."""
    def csv_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    header = "context,question,answer_text,answer_start\n"
    (tmp_path / "file").write_text("in the way")
    good = csv_file("good.csv", GOOD)
    cases = [
        ("eval", tmp_path / "none.csv", ["none.csv", "no such file"]),
        ("eval", csv_file("column.csv", "context,question\na,b\n"),
         ["column.csv", "answer_text, answer_start", "needed"]),
        ("eval", csv_file("empty.csv", ""), ["empty.csv", "empty", "needed"]),
        ("eval", csv_file("latin.csv", header.encode() + "Zoë,who?,Zoë,0\n".encode("latin-1")),
         ["latin.csv, record 0, byte", "UTF-8"]),
        ("eval", csv_file("start.csv", GOOD + "Ann has 3 keys.,who?,Ann,first\n"),
         ["start.csv, record 1, column answer_start", "'first'", "number"]),
        ("eval", csv_file("absent.csv", GOOD + "Ann has 3 keys.,who?,Bob,0\n"),
         ["absent.csv, record 1, column answer_text", "'Bob'"]),
        ("train", csv_file("blank.csv", GOOD + "Ann has 3 keys., ,Ann,0\n"),
         ["blank.csv, record 1, column question", "' '"]),
        ("train", csv_file("none-left.csv", header), ["none-left.csv", "header"]),
        ("test", good, ["file", "cannot be used as an output folder"]),
    ]
    before = {path.name for path in tmp_path.iterdir()}
    for job, path, expected in cases:
        output = tmp_path / "file" / "out" if job == "test" else tmp_path / f"out-{path.stem}"
        code, result, err = run(capsys, job, "--input", path, "--model", tiny_model, "--output", output)
        assert code == 2, (path.name, err)
        for text in expected:
            assert text in str(result["error"]) and text in err, (path.name, text, result["error"])
        written = [file for file in output.rglob("*") if file.is_file()] if output.exists() else []
        assert not written, (path.name, written)
    assert {path.name for path in tmp_path.iterdir()} - {f"out-{path.stem}" for _, path, _ in cases} == before


def test_options_are_checked_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["test", "--input", "a.csv", "--model", "m"])
    assert caught.value.code == 2 and "--output" in capsys.readouterr().err
    assert cli.main(["train", "--input", "a", "--model", "m", "--output", "o", "--learning-rate", "-1"]) == 2
    assert "learning_rate is -1.0; allowed: a number at least 0" in capsys.readouterr().err
    both = ("eval", "--input", "a.csv", "--compare", "a", "b")
    for arguments, message in (
        (("eval", "--input", "a.csv"), "allowed: --model NAME, or --compare A B"),
        (both, "--compare needs --output"),
        ((*both, "--model", "c", "--output", "o"), "--compare a b and --model are both given"),
        ((*both, "--calibrate", "--output", "o"), "--compare a b and --calibrate are both given"),
    ):
        code, result, err = run(capsys, *arguments)
        assert code == 2 and message in str(result["error"]) and message in err
    limits = ("--min-probability", "0.5", "--target-precision", "0.9")
    assert cli.main(["test", "--input", "a", "--model", "m", "--output", "o", *limits]) == 2
    assert "target_precision is 0.9; allowed: one of them" in capsys.readouterr().err
    code, result, _ = run(capsys, "eval", "--input", "a.csv", "--model", "no-such-folder")
    assert code == 2 and "give a local folder" in str(result["error"])


@pytest.mark.parametrize("job", ["train", "eval", "test", "prepare"])
def test_every_option_is_a_flag_with_help(job: str) -> None:
    command = [sys.executable, "-m", f"jobs.{job}", "--help"]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"}
    )
    flags = {
        "train": "--num-workers --use-gpu --learning-rate --eval-input", "eval": "--max-bad-rows --compare",
        "test": "--use-gpu --overwrite --align-to-words --target-precision --keep-columns --single-file --verify",
        "prepare": "--dry-run --output --max-bad-rows",
    }
    for flag in ["--input", "--model", "--precision", "--endpoint-url", *flags[job].split()]:
        assert flag in done.stdout
    assert "default" in done.stdout


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_eval_compares_two_models(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(GOOD)
    output = tmp_path / "out"
    code, result, err = run(capsys, "eval", "--input", rows, "--compare", tiny_model, tiny_model, "--output", output)
    assert code == 0 and result["status"] == "done", err
    assert result["a"] == result["b"] and (result["num_rows"], result["num_contexts"]) == (1, 1)
    assert result["f1_difference"] == {"difference": 0, "low": None, "high": None, "won": 0, "lost": 0, "tied": 1}
    assert (result["model_a"], result["output"]) == (str(tiny_model), str(output))
    assert {path.name for path in output.iterdir()} == {"a", "b", "compare.html", "compare.json", "details"}


@pytest.mark.usefixtures("ray_session")
def test_prepare_says_what_is_bad_and_what_a_training_would_take(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    header, row = GOOD.splitlines(keepends=True)
    lines = [row] * 1000
    lines[600] = "Ann has 3 keys.,who?,Bob,0\n"
    lines[700] = f"Ann has 3 keys.,{'who ' * 500},Ann,0\n"
    lines[999] = f"{'The weather was fine. ' * 200}Ann has 3 keys.,who has 3 keys?,Ann has 3 keys,4400\n"
    rows = tmp_path / "rows.csv"
    rows.write_text(header + "".join(lines))
    arguments = ("prepare", "--input", rows, "--model", tiny_model)
    code, result, _ = run(capsys, *arguments, "--output", tmp_path / "out", "--batch-size", "10")
    assert code == 0 and result["status"] == "done" and "rows.csv, record 600" in caplog.text
    assert (result["num_rows"], result["num_checked_rows"], result["exact"]) == (1000, 1000, True)
    assert result["label_counts"] == {"not_found": 1, "ok": 999}
    assert (result["num_bad_rows"], result["num_questions_too_long"], result["num_usable_rows"]) == (2, 1, 998)
    assert result["num_rows_in_many_windows"] == 1 and result["train_would_refuse"] is True
    windows = result["num_windows"]
    assert isinstance(windows, int) and windows > 998 and result["estimated_windows"] == windows
    assert result["estimated_steps"] == 3 * -(-windows // 10)
    assert sum(result["window_lengths"].values()) == windows  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["num_windows"] == windows
    assert pq.read_table(tmp_path / "out" / "quarantine.parquet")["row_index"].to_pylist() == [600, 700]

    monkeypatch.setattr("ray_qa.preparation.SAMPLE_PARTS", 2)
    code, sampled, _ = run(capsys, *arguments, "--dry-run", "--max-bad-rows", "0.5")
    assert code == 0 and sampled["exact"] is False and sampled["train_would_refuse"] is False
    assert (sampled["num_rows"], sampled["num_checked_rows"]) == (1000, 256 + 232)
    assert sampled["num_windows"] == windows - 510
    assert sampled["estimated_windows"] == round((windows - 510) * 1000 / 488)


def test_help_needs_neither_torch_nor_ray() -> None:
    program = (
        "import sys\nfrom ray_qa import cli\n"
        "try:\n    cli.main(['test', '--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_figures_that_are_no_numbers_are_null_in_json() -> None:
    assert json.loads(cli._json({"loss": float("nan"), "f1": 1.5})) == {"loss": None, "f1": 1.5}
