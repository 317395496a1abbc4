"""Upload of an export to the Hugging Face hub, private unless `--public` is given. The local folder stays."""

import glob
from collections.abc import Callable
from pathlib import Path

from distill.errors import UserError, reason_of
from distill.exporters.place import listed

TOKEN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def check_repository(name: str) -> None:
    """Refuse an invalid repository name, before anything is written.

    Raises:
        UserError: naming the repository.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"--push is {name!r}, which is not a valid repository name ({reason_of(error)}); use OWNER/NAME"
        ) from error
    if name.count("/") != 1:
        raise UserError(f"--push is {name!r}; it should read OWNER/NAME, the owner being you or an organisation")


def push_folder(folder: Path, name: str, public: bool, say: Callable[[str], None]) -> str:
    """Upload an export's files, without the user's own files in its folder.

    Args:
        public: create the repository as a public one; an existing repository keeps its visibility.

    Returns:
        the repository's address.

    Raises:
        UserError: no token, no network or no permission; or the repository is public and `public` is false.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    files = listed(folder)
    say(f"pushing {len(files)} files to {name} ({'public' if public else 'private'})")
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        if not public and api.repo_info(name).private is False:
            raise UserError(
                f"the repository {name} exists and is public; nothing was pushed: add --public to push there, or name "
                f"another repository. The export is in {folder}"
            )
        api.upload_folder(
            repo_id=name,
            folder_path=str(folder),
            commit_message="Export of a distilled student",
            allow_patterns=[glob.escape(file) for file in files],
        )
    except UserError:
        raise
    except Exception as error:  # raised by HTTP libraries, whose types differ from version to version
        raise UserError(f"the push to {name} failed: {_why(error)}. The export is in {folder}; {_again(folder)}") from error
    address = f"{api.endpoint}/{name}"
    say(f"pushed to {address}")
    return address


def _why(error: Exception) -> str:
    """Explain an error of the hub's client, with its fix."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE keeps this machine off the hub; unset it"
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return f"you are not logged in to the hub; {TOKEN}"
    if status == 403:
        return f"your token may not write there; {TOKEN}, or name a repository of your own"
    if status is not None:
        return f"the hub answered {status} ({_first(error)})"
    if isinstance(error, OSError) or "onnect" in type(error).__name__ or "Timeout" in type(error).__name__:
        return f"the hub cannot be reached ({_first(error)}); try again with a network"
    return _first(error)


def _first(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _again(folder: Path) -> str:
    return f"`hf upload REPO {folder}` uploads it later"
