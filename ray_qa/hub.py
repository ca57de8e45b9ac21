"""A model folder goes to the Hugging Face Hub.

The hub is the one that HF_ENDPOINT names; its token comes from the caller, the environment (HF_TOKEN) or the login
that huggingface_hub keeps, and is never logged.
"""

from __future__ import annotations

import os
from pathlib import Path

from ray_qa.errors import OptionError, WorkError


def check_repository(repo_name: str) -> None:
    """Raise OptionError where ``repo_name`` cannot be the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_name)
    except HFValidationError as error:
        raise OptionError(
            f"the repository name {repo_name!r} is not possible ({error}); allowed: NAME or OWNER/NAME"
        ) from error


def push_folder(
    directory: str | os.PathLike[str], repo_name: str, *, private: bool = True, token: str | bool | None = None
) -> str:
    """Send the files of a model folder to a repository, which is made where it is missing; gives its address.

    Sub-folders (event files) stay here. A repository that is there keeps its visibility.

    Raises:
        OptionError: no possible name.
        WorkError: the hub is out of reach, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    check_repository(repo_name)
    api = HfApi(token=token)
    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        address = api.create_repo(repo_name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=Path(directory), ignore_patterns=["*/*", "_*"],
            commit_message="Trained with ray_qa",
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise WorkError(
            f"{os.fspath(directory)} could not be sent to {repo_name} on {api.endpoint} ({error}); the model is kept, "
            "and sending it can be tried again; a token that may write is taken from HF_TOKEN"
        ) from error
    finally:
        if not quiet:
            enable_progress_bars()
    return str(address)
