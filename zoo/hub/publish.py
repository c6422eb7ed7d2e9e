"""Upload of an exported student to the Hub: everything staged and checked first, then one commit."""
from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ..errors import UserError
from .card import PLACE, check
from .export import RECORD

LIMIT = 250      # files beyond which the client splits an upload into several commits


def push(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload the student at `folder` to `repo_id` (user/name) in one atomic commit; returns the commit's URL.

    The repository is created when it does not exist. Raises UserError before any request for a folder that is no student, a card
    that is not fit, or too many files; and for a refused login, a forbidden repository or a bad name."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    folder = Path(folder)
    if not (folder / RECORD).exists():
        raise UserError(f"{folder} is not an exported student (it has no {RECORD}): give the folder a run exported")
    with tempfile.TemporaryDirectory() as temp:
        stage = Path(temp) / "student"
        shutil.copytree(folder, stage)
        card = stage / "README.md"
        if card.exists():
            card.write_text(card.read_text(encoding="utf-8").replace(PLACE, repo_id), encoding="utf-8")
        check(stage)
        count = sum(p.is_file() for p in stage.rglob("*"))
        if count >= LIMIT:
            raise UserError(f"{folder} has {count} files and one atomic upload holds fewer than {LIMIT}: remove what is not part of the student")
        api = HfApi()
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo.repo_id, folder_path=stage, commit_message="Few-step student").commit_url)
        except LocalTokenNotFoundError as error:
            raise UserError(f"pushing to {repo_id} needs a login: run `hf auth login` or set HF_TOKEN") from error
        except HFValidationError as error:
            raise UserError(f"{repo_id!r} is not a repository name: give user/name") from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            remedy = {401: "log in with `hf auth login` or set HF_TOKEN to a valid token",
                      403: "the token may not write there: use one with write access, or push to your own user/name",
                      404: "check the user or organisation in user/name"}.get(status)
            if remedy is None:
                raise
            raise UserError(f"the Hub refused the push to {repo_id} ({status}): {remedy}") from error
