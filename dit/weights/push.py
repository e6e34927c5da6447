"""An export on a hub."""

from pathlib import Path
from typing import Any


def push(folder: Path, repo: str, hub: Any = None) -> str:
    """Upload a folder to a model repository of the Hugging Face hub, private if it is new; where it is.

    Args:
        folder: an export.
        repo: like `name/model`.
        hub: what uploads; None: the hub that the user is logged in to.

    Raises:
        ImportError: if huggingface_hub is missing.
        ValueError: if the hub does not take it; the folder stays.
    """
    if hub is None:
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise ImportError("push= needs huggingface_hub: pip install 'ditforge[diffusers]'") from error
        hub = HfApi()
    try:
        hub.create_repo(repo, private=True, exist_ok=True)
        return str(hub.upload_folder(repo_id=repo, folder_path=str(folder)))
    except Exception as error:  # of the network and the hub, of many kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"push={repo}: the hub did not take {folder}, which is written ({reason}): log in with `hf auth login`, or "
            f"upload it later with `hf upload {repo} {folder}`"
        ) from error
