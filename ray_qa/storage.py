"""One way to find, read and atomically publish files, on a disk and on an object store.

Knows nothing of CSV, Parquet or Ray. A `Location` can be pickled: it carries its file system, with
the endpoint and the credentials that the caller gave, to any worker.
"""

from __future__ import annotations

import configparser
import contextlib
import errno
import glob as local_glob
import json
import math
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from ray_qa.errors import InputError, OptionError, OutputError, UserError

T = TypeVar("T")
PathLike = str | os.PathLike[str]

_RETRIES = 4
_FINAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR}
_GLOB_CHARACTERS = "*?["


def cache_home() -> Path:
    """The one folder for everything that can be made again: $RAY_QA_HOME, else ~/.cache/ray_qa."""
    home = os.environ.get("RAY_QA_HOME")
    return Path(home).expanduser().absolute() if home else Path.home() / ".cache" / "ray_qa"


#: What lies under the cache home, each entry by itself; none is missed that nobody used for so long.
_CACHES = ("windows", "staged", "models", "fetched", "runs", "checkpoints")
_CACHE_DAYS = 30


def prune_cache(days: float = _CACHE_DAYS) -> None:
    """Delete what killed runs left under the cache home, and what was not used for ``days`` days."""
    oldest = time.time() - days * 86_400
    for name in _CACHES:
        for entry in local_glob.glob(str(cache_home() / name / "*")):
            with contextlib.suppress(OSError):  # gone already, or somebody else's
                if _newest_change(Path(entry)) < oldest:
                    shutil.rmtree(entry) if os.path.isdir(entry) else os.unlink(entry)


def _newest_change(path: Path) -> float:
    """When the entry or anything right inside it changed last, in seconds since the epoch."""
    inside = path.iterdir() if path.is_dir() else ()
    return max(entry.stat().st_mtime for entry in (path, *inside))


@dataclass(frozen=True)
class Location:
    """A file or folder on some file system.

    ``path`` is the path within ``filesystem``, ``uri`` what a person reads in messages: without what is secret in it.
    """

    filesystem: pafs.FileSystem
    path: str
    uri: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    @property
    def full_name(self) -> str:
        """What finds the place from anywhere: a local path in full, else the URI."""
        return self.path if self.is_local else self.uri

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    def __truediv__(self, name: str) -> Location:
        return Location(
            self.filesystem, f"{self.path.rstrip('/')}/{name}", f"{self.uri.rstrip('/')}/{name}"
        )

    def info(self) -> pafs.FileInfo:
        return retry(lambda: self.filesystem.get_file_info(self.path))

    def exists(self) -> bool:
        return self.info().type != pafs.FileType.NotFound

    def list(self) -> list[pafs.FileInfo]:
        """Direct children, in name order; an absent folder has none."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        return sorted(retry(lambda: self.filesystem.get_file_info(selector)), key=lambda i: i.path)

    def read_bytes(self, start: int = 0, end: int | None = None) -> pa.Buffer:
        """The bytes [start, end) of the file; to its end when ``end`` is None."""

        def read() -> pa.Buffer:
            with self.filesystem.open_input_file(self.path) as file:
                stop = file.size() if end is None else end
                return file.read_at(stop - start, start) if stop > start else pa.py_buffer(b"")

        return pa.py_buffer(retry(read))

    def open_stream(self, *, compression: str | None = None) -> pa.NativeFile:
        """A forward-only stream; decompressed when ``compression`` names a codec."""
        return retry(lambda: self.filesystem.open_input_stream(self.path, compression=compression))

    def publish(self, data: bytes | pa.Buffer) -> None:
        """Write the whole file so that a reader sees all of it or none.

        On a disk: a file whose name begins with an underscore, then a rename. On an object store: one write,
        which becomes visible when it is complete.
        """
        try:
            retry(lambda: self._publish_once(data))
        except OSError as error:
            raise OutputError(f"{self.uri}: cannot be written ({error})") from error

    def _publish_once(self, data: bytes | pa.Buffer) -> None:
        if not self.is_local:
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(data)
            return
        target = Path(self.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f"_{target.name}.{uuid.uuid4().hex}")
        try:
            with open(staged, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(staged, target)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise

    def make_folder(self) -> None:
        """Create the folder and prove that it can be written. Buckets are never created."""
        try:
            if not isinstance(self.filesystem, (pafs.S3FileSystem, pafs.GcsFileSystem)):
                # An object store has no folders, and an empty object in place of one would only be in the way.
                self.filesystem.create_dir(self.path, recursive=True)
            probe = self / f"_probe.{uuid.uuid4().hex}"
            probe._publish_once(b"")
            self.filesystem.delete_file(probe.path)
        except OSError as error:
            raise OutputError(
                f"{self.uri}: cannot be used as an output folder ({error}); "
                "allowed is a folder that this user may create and write"
            ) from error

    def delete(self) -> None:
        """Delete the file, if it is there."""
        try:
            retry(lambda: self.filesystem.delete_file(self.path))
        except FileNotFoundError:
            pass


def json_text(value: Any, *, indent: int | None = None) -> str:
    """``value`` as JSON that every reader takes: a number that is not finite becomes null."""
    return json.dumps(_finite(value), ensure_ascii=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def usable_folder(location: Location | None) -> Iterator[None]:
    """Make the folder and prove that it can be written, then check whatever else the caller may have got wrong.

    Where that ends in a UserError, a folder that was not there before is taken away again.
    """
    if location is None:
        yield
        return
    was_there = location.exists()
    location.make_folder()
    try:
        yield
    except UserError:
        if location.is_local and not was_there:
            with contextlib.suppress(OSError):
                os.rmdir(location.path)
        raise


def retry(call: Callable[[], T], *, attempts: int = _RETRIES) -> T:
    """``call()``, again after a growing pause when storage fails in a way that may pass."""
    for attempt in range(attempts):
        try:
            return call()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            if error.errno in _FINAL_ERRNOS or attempt == attempts - 1:
                raise
            time.sleep(0.2 * 2**attempt * (1 + random.random()))
    raise AssertionError("unreachable")


def locate(path: PathLike, *, storage_options: Mapping[str, object] | None = None) -> Location:
    """The location of a local path or of a URI (``s3://``, ``gs://``, or any that fsspec knows).

    ``storage_options`` go to the file system of a URI: for ``s3://`` the arguments of
    `pyarrow.fs.S3FileSystem` (``endpoint_override``, ``access_key``, ...), for ``gs://`` those of
    `pyarrow.fs.GcsFileSystem`, else those of the fsspec file system. Local paths take none of them.

    What the environment and the files under ~/.aws say of S3 (``AWS_ACCESS_KEY_ID``, ``AWS_REGION``,
    ``AWS_ENDPOINT_URL``, ...) is read here, and travels inside the location: a worker need not have it. Where they say
    nothing, every node finds credentials as its S3 client does, such as those of its machine's role.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or not text:
        raise OptionError(f"a path must be a non-empty string or os.PathLike, found {path!r}")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Location(pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text)), text)
    if scheme == "file":
        return Location(pafs.LocalFileSystem(), os.path.abspath(rest), text)
    options = dict(storage_options or {})
    uri = without_secrets(text)
    try:
        if scheme == "s3":
            rest, options = _s3_options(rest, options)
            if options:
                return Location(pafs.S3FileSystem(**options), rest.rstrip("/"), uri)
        if scheme in ("gs", "gcs") and options:
            return Location(pafs.GcsFileSystem(**options), rest, uri)
        if scheme in ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss") and not options:
            filesystem, inner = pafs.FileSystem.from_uri(text)
            return Location(filesystem, inner, uri)
        import fsspec

        remote, inner = fsspec.url_to_fs(text, **options)
        return Location(pafs.PyFileSystem(pafs.FSSpecHandler(remote)), inner, uri)
    except (ValueError, TypeError, ImportError, OSError, pa.ArrowInvalid) as error:
        why = str(error)
        for secret in sorted(_secrets_of(text), key=len, reverse=True):
            why = why.replace(secret, _MASK)
        # Without the cause: its message may hold them too.
        raise OptionError(f"{uri}: not a path or URI that can be opened ({why})") from None


_MASK = "***"
#: Parameters of URIs that may be read by everybody; the values of all others are masked.
_OPEN_PARAMETERS = {
    "region", "scheme", "endpoint_override", "allow_bucket_creation", "allow_bucket_deletion", "allow_delayed_open",
    "retry_limit_seconds", "tls_ca_file_path",
}


def without_secrets(uri: str) -> str:
    """``uri`` with credentials masked: for messages, logs and manifests."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    for secret in sorted(_secrets_of(uri), key=len, reverse=True):
        rest = rest.replace(secret, _MASK, 1)
    return f"{scheme}://{rest}"


def _secrets_of(uri: str) -> set[str]:
    """User and password, and the values of parameters that may be secret."""
    rest, _, query = uri.partition("://")[2].partition("?")
    authority, at, _ = rest.partition("/")[0].rpartition("@")
    found = {authority} if at and authority else set()
    for parameter in query.split("&"):
        name, _, value = parameter.partition("=")
        if value and name not in _OPEN_PARAMETERS:
            found.add(value)
    return found


_S3_ENVIRONMENT = {
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "endpoint_override": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
}
_S3_CREDENTIALS = {
    "access_key": "AWS_ACCESS_KEY_ID", "secret_key": "AWS_SECRET_ACCESS_KEY", "session_token": "AWS_SESSION_TOKEN",
}


def _s3_options(rest: str, given: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """Bucket and key of a URI (``rest`` of it), and ``given``, completed from it, the environment and ~/.aws.

    The options are empty where all of these say nothing, or where the URI says it in parameters (``?region=``).
    """
    if "=" in rest.partition("?")[2] and not given:
        return rest, {}
    options = dict(given)
    authority, slash, key = rest.partition("/")
    told, at, bucket = authority.rpartition("@")
    if at:
        rest = bucket + slash + key
        names = ("access_key", "secret_key")
        options |= {name: unquote(value) for name, value in zip(names, told.split(":", 1), strict=False) if value}
    profile = _aws_profile()
    for name, variables in _S3_ENVIRONMENT.items():
        value = next((os.environ[variable] for variable in variables if os.environ.get(variable)), profile.get(name))
        if name not in options and value is not None:
            options[name] = value
    # Someone who names an account, a role or nobody does not mean the account of the environment.
    if not options.keys() & {*_S3_CREDENTIALS, "anonymous", "role_arn"}:
        if os.environ.get("AWS_ACCESS_KEY_ID"):
            options |= {name: os.environ[key] for name, key in _S3_CREDENTIALS.items() if os.environ.get(key)}
        else:
            options |= {name: profile[name] for name in _S3_CREDENTIALS if name in profile}
    if not options:
        return rest, {}
    if "region" not in options:
        # Other stores than Amazon's mostly do not care; for Amazon the bucket's region is looked up.
        own = "endpoint_override" in options
        options["region"] = "us-east-1" if own else pafs.resolve_s3_region(rest.partition("/")[0])
    scheme, separator, host = str(options.get("endpoint_override", "")).partition("://")
    if separator:
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme}
    # Small files go up in one request; larger ones in several, and become visible with the last.
    return rest, {"allow_delayed_open": True} | options


def _aws_profile() -> dict[str, str]:
    """Keys, region and endpoint of the user's profile, where the files under ~/.aws hold them as plain values."""
    name = os.environ.get("AWS_PROFILE") or "default"
    places = (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    )
    told: dict[str, str] = {}
    for variable, file, section in places:
        parser = configparser.ConfigParser(interpolation=None)
        path = os.environ.get(variable) or os.path.join("~", ".aws", file)
        with contextlib.suppress(OSError, UnicodeDecodeError, configparser.Error):
            parser.read(os.path.expanduser(path), encoding="utf-8")
        if parser.has_section(section):
            told |= parser[section]
    names = {name: _S3_CREDENTIALS[name].lower() for name in _S3_CREDENTIALS}
    names |= {"region": "region", "endpoint_override": "endpoint_url"}
    return {name: told[stored] for name, stored in names.items() if told.get(stored)}


def expand(
    paths: PathLike | Sequence[PathLike], *, suffixes: tuple[str, ...],
    storage_options: Mapping[str, object] | None = None,
) -> list[Location]:
    """The input files that ``paths`` names, in order: a list in its own order, a folder or a
    glob in path order.

    A folder gives its direct children that end in one of ``suffixes`` and do not begin with ``_`` or ``.``.

    Raises:
        InputError: a file is missing, or a folder or glob gives none.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not paths:
        raise InputError("no input file was given; allowed: a path, a folder, a glob, or a list of these")
    found: list[Location] = []
    for path in paths:
        found += _expand_one(path, suffixes, storage_options)
    return found


def _expand_one(path: PathLike, suffixes: tuple[str, ...], storage_options) -> list[Location]:
    location = locate(path, storage_options=storage_options)
    try:
        info = location.info()
        if info.type == pafs.FileType.File:
            return [location]
        if info.type == pafs.FileType.Directory:
            matches = [
                location / child.base_name for child in location.list()
                if child.type == pafs.FileType.File and child.base_name.endswith(suffixes)
                and not child.base_name.startswith(("_", "."))
            ]
            if not matches:
                raise InputError(f"{location.uri}: the folder holds no file that ends in {', '.join(suffixes)}")
            return matches
        if any(character in location.path for character in _GLOB_CHARACTERS):
            matches = _expand_glob(location)
            if not matches:
                raise InputError(f"{location.uri}: the pattern matches no file")
            return matches
    except OSError as error:
        raise InputError(f"{location.uri}: cannot be read ({error})") from error
    raise InputError(f"{location.uri}: no such file")


def _expand_glob(location: Location) -> list[Location]:
    if location.is_local:
        names = sorted(name for name in local_glob.glob(location.path, recursive=True) if os.path.isfile(name))
        return [Location(location.filesystem, name, name) for name in names]
    fixed = location.path[: min(location.path.index(c) for c in _GLOB_CHARACTERS if c in location.path)]
    base = fixed.rpartition("/")[0]
    selector = pafs.FileSelector(base, recursive="/" in location.path[len(base) + 1 :], allow_not_found=True)
    prefix = location.uri[: len(location.uri) - len(location.path)]
    return [
        Location(location.filesystem, info.path, prefix + info.path)
        for info in sorted(location.filesystem.get_file_info(selector), key=lambda i: i.path)
        if info.type == pafs.FileType.File and PurePosixPath(info.path).match(location.path)
    ]
