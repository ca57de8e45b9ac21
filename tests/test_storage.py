from __future__ import annotations

import errno
import os
import pickle
import time
from pathlib import Path

import pyarrow as pa
import pytest

from ray_qa import storage
from ray_qa.errors import InputError, OptionError, OutputError
from ray_qa.storage import expand, locate, retry, without_secrets


def test_publish_shows_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = locate(tmp_path / "deep" / "file.bin")
    target.publish(b"first")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space left")))
    with pytest.raises(OutputError, match=r"file\.bin: cannot be written .*no space left"):
        target.publish(b"second, longer")
    assert target.read_bytes().to_pybytes() == b"first"
    assert os.listdir(tmp_path / "deep") == ["file.bin"]


def test_what_nobody_used_for_long_leaves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_QA_HOME", str(tmp_path))
    old = time.time() - 31 * 86_400
    for name, file in (("windows/old", "shard"), ("windows/used", "shard"), ("models/grown", "weights"),
                       ("trained/result", "weights"), ("other/old", "file")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / file).write_text("x")
        os.utime(tmp_path / name / file, (old, old))
        os.utime(tmp_path / name, (old, old))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "left.json").write_text("x")
    os.utime(tmp_path / "runs" / "left.json", (old, old))
    os.utime(tmp_path / "windows" / "used")
    os.utime(tmp_path / "models" / "grown" / "weights")
    storage.prune_cache()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))
    # A trained model is a result, and what does not belong here is somebody else's.
    assert left == ["models/grown", "other/old", "trained/result", "windows/used"]


def test_ranges_and_streams(tmp_path: Path) -> None:
    location = locate(tmp_path / "x")
    location.publish(pa.py_buffer(b"0123456789"))
    assert location.read_bytes(2, 5).to_pybytes() == b"234"
    assert location.read_bytes(7).to_pybytes() == b"789"
    assert location.read_bytes(5, 5).to_pybytes() == b""
    with pickle.loads(pickle.dumps(location)).open_stream() as stream:
        assert stream.read() == b"0123456789"


def test_a_fault_that_passes_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    calls = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("connection reset")
        return "done"

    assert retry(flaky) == "done" and len(calls) == 3


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("no"), OSError(errno.ENOSPC, "full")])
def test_a_fault_that_stays_is_not_tried_again(error: OSError) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise error

    with pytest.raises(OSError):
        retry(fail)
    assert len(calls) == 1


def test_expand_keeps_list_order_and_sorts_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "c.txt", "_hidden.csv", "sub.csv/x"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")

    def names(paths: object) -> list[str]:
        return [location.name for location in expand(paths, suffixes=(".csv",))]  # type: ignore[arg-type]

    assert names(tmp_path) == ["a.csv", "b.csv"]
    assert names(str(tmp_path / "*.csv")) == ["_hidden.csv", "a.csv", "b.csv"]
    assert names([tmp_path / "b.csv", tmp_path / "a.csv"]) == ["b.csv", "a.csv"]
    assert names(f"file://{tmp_path}/a.csv") == ["a.csv"]


@pytest.mark.parametrize(
    ("name", "problem"), [("none.csv", "no such file"), ("*.csv", "matches no file"), ("", "holds no file")]
)
def test_expand_names_what_is_missing(tmp_path: Path, name: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        expand(f"{tmp_path}/{name}", suffixes=(".csv",))


def test_no_input_and_no_path_are_refused() -> None:
    with pytest.raises(InputError, match="no input file"):
        expand([], suffixes=(".csv",))
    with pytest.raises(OptionError, match="non-empty"):
        locate("")
    with pytest.raises(OptionError, match="nosuch://x/y"):
        locate("nosuch://x/y")


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be used as an output folder"):
        locate(tmp_path / "file" / "out").make_folder()


SECRETS = {
    "s3://key-1:pass%2Fword@bucket/rows.csv": "s3://***@bucket/rows.csv",
    "s3://bucket/rows.csv?region=eu-1&secret_key=pass": "s3://bucket/rows.csv?region=eu-1&secret_key=***",
    "https://host/rows.csv?sig=abc123&se=2030": "https://host/rows.csv?sig=***&se=***",
    "ftp://user:pass@host/x": "ftp://***@host/x",
    "s3://bucket/a?.csv": "s3://bucket/a?.csv",
    "s3://bucket/user@host/x": "s3://bucket/user@host/x",
    "/local/user:pass@x?y=z": "/local/user:pass@x?y=z",
}


@pytest.mark.parametrize("uri", SECRETS)
def test_credentials_in_a_uri_are_masked(uri: str) -> None:
    assert without_secrets(uri) == SECRETS[uri]


def test_credentials_in_a_uri_are_used_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    location = locate("s3://key-1:pass%2Fword@bucket/folder/")
    assert (location.path, location.uri) == ("bucket/folder", "s3://***@bucket/folder/")
    same = locate("s3://bucket/folder", storage_options={"access_key": "key-1", "secret_key": "pass/word"})
    assert location.filesystem.equals(same.filesystem)
    for text in (repr(location), str(location / "x"), location.full_name):
        assert "pass" not in text and "key-1" not in text
    with pytest.raises(OptionError) as caught:
        locate("nosuch://key-1:pass@bucket/x?token=t0k3n")
    assert "nosuch://***@bucket/x?token=***" in str(caught.value)
    assert "pass" not in str(caught.value) and caught.value.__cause__ is None


def test_the_users_aws_files_travel_with_a_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain keys only: what needs the cloud's help (a role, single sign-on) is left to the S3 client of each node."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = key-1\naws_secret_access_key = a%b/c\n"
        "[other]\naws_access_key_id = key-2\naws_secret_access_key = s2\naws_session_token = t2\n"
    )
    (tmp_path / "config").write_text(
        "[default]\nregion = eu-1\nendpoint_url = http://127.0.0.1:1\n[profile other]\nregion = eu-2\n"
        "[profile sso]\nregion = eu-3\nsso_session = me\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    plain = {"access_key": "key-1", "secret_key": "a%b/c", "region": "eu-1"}
    assert storage._s3_options("b/x", {}) == (
        "b/x", {"allow_delayed_open": True, "endpoint_override": "127.0.0.1:1", "scheme": "http"} | plain
    )
    monkeypatch.setenv("AWS_PROFILE", "other")
    found = storage._s3_options("b/x", {})[1]
    assert (found["access_key"], found["session_token"], found["region"]) == ("key-2", "t2", "eu-2")
    assert "access_key" not in storage._s3_options("b/x", {"anonymous": True})[1]
    monkeypatch.setenv("AWS_PROFILE", "sso")
    assert storage._s3_options("b/x", {})[1] == {"allow_delayed_open": True, "region": "eu-3"}
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert storage._s3_options("b/x", {}) == ("b/x", {})
