"""What can go wrong, and the exit code that a job ends with when it does.

    RayQAError                 1  the work failed
    ├── UserError              2  bad input or options; nothing was written
    │   ├── OptionError           an option is unknown or out of range
    │   ├── InputError            an input file cannot be used
    │   │   ├── CSVError          a file is not the CSV it should be
    │   │   └── BadRowsError      labelled rows that cannot be used
    │   ├── ModelError            a model or tokenizer cannot be used
    │   └── OutputError           an output folder cannot be used
    ├── WorkError              1  something broke while the work was running
    └── ErrorRowsError         3  everything was written, but too many rows have an error

    KeyboardInterrupt        130  Ctrl-C; 143 for SIGTERM, which a job turns into it
    └── Interrupted               says how far the work got

Every message says what is wrong, where (file, row, column), what was found and what is allowed.
"""

from __future__ import annotations


class RayQAError(Exception):
    """Base of every error that ray_qa raises on purpose."""

    exit_code = 1


class UserError(RayQAError, ValueError):
    """Something that the caller can mend; raised before expensive work starts."""

    exit_code = 2


class OptionError(UserError):
    """An option is unknown, of the wrong type, or out of range."""


class InputError(UserError):
    """An input file is missing, unreadable, or lacks what the call needs."""


class CSVError(InputError):
    """A file is not the CSV it should be.

    ``record`` is the 0-based position among the file's data records (None for the header or when
    it is not known), ``byte_offset`` counts from the start of the (uncompressed) file.
    """

    def __init__(
        self, problem: str, *, file: str, byte_offset: int | None = None, record: int | None = None,
        excerpt: str | None = None, allowed: str | None = None,
    ) -> None:
        where = [file]
        if record is not None:
            where.append(f"record {record}")
        if byte_offset is not None:
            where.append(f"byte {byte_offset}")
        message = f"{', '.join(where)}: {problem}"
        if excerpt is not None:
            message += f"; found {excerpt!r}"
        if allowed is not None:
            message += f"; {allowed}"
        super().__init__(message)
        # CSVError crosses process borders inside Ray's task errors: keep what pickling needs.
        self._fields = (problem, file, byte_offset, record, excerpt, allowed)
        self.file, self.byte_offset, self.record = file, byte_offset, record

    def __reduce__(self):
        return _rebuild_csv_error, self._fields


def _rebuild_csv_error(problem, file, byte_offset, record, excerpt, allowed) -> CSVError:
    return CSVError(
        problem, file=file, byte_offset=byte_offset, record=record, excerpt=excerpt, allowed=allowed
    )


class BadRowsError(InputError):
    """Labelled rows that cannot be used for training or evaluation."""


class ModelError(UserError):
    """A model or tokenizer is unknown, out of reach, unsafe, or of the wrong kind."""


class OutputError(UserError):
    """An output folder cannot be written, or already holds something else."""


class WorkError(RayQAError):
    """Something broke while the work was running; what was finished is kept."""


class ErrorRowsError(RayQAError):
    """Every row was written, but more rows than allowed carry an error instead of an answer."""

    exit_code = 3


class Interrupted(KeyboardInterrupt):
    """The work was stopped from outside; what was finished is kept. ``summary`` counts it."""

    def __init__(self, message: str, summary: dict[str, int]) -> None:
        super().__init__(message)
        self.summary = summary
