"""Uploading an exported adapter to the Hugging Face hub; nothing is uploaded unless it is asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from midblock.errors import OutputError, SettingsError
from midblock.models.quiet import first_line
from midblock.settings.base import name_of

__all__ = ["push_adapter", "require_hub"]


def require_hub() -> None:
    """Stop before anything is trained where nothing can be uploaded.

    Raises:
        SettingsError: the hub is switched off, or there is no token.
    """
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise SettingsError(f"{name_of('push')} uploads to the Hugging Face hub, which HF_HUB_OFFLINE switches off.")
    if not get_token():
        raise SettingsError(f"{name_of('push')} needs a token of the Hugging Face hub that may write: run `hf auth "
                            "login` or set HF_TOKEN.")


def push_adapter(folder: Path, repo: str) -> str:
    """Upload an adapter's folder with its card, whole, as one commit.

    Args:
        folder: What `export_adapter` wrote.
        repo: ``owner/name``; made, private, where it does not exist.

    Returns:
        Address of the repository.

    Raises:
        OutputError: the hub refused it or cannot be reached; the folder is kept.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    files = [CommitOperationAdd(p.name, _card(p) if p.name == "README.md" else p) for p in sorted(folder.iterdir())]
    try:
        address = str(api.create_repo(repo, private=True, exist_ok=True))
        api.create_commit(repo, files, commit_message="Adapter made with midblock")
    except Exception as error:  # of the network, the hub, or the client: the adapter itself is finished
        raise OutputError(f"the adapter is in {folder}, but uploading it to {repo} failed: {first_line(error)} "
                          f"Upload it later with `hf upload {repo} {folder}`.") from error
    return address


def _card(path: Path) -> bytes:
    """The card without the base's name where that is a folder of this machine, which the hub does not take."""
    from huggingface_hub import ModelCard

    card = ModelCard(path.read_text(encoding="utf-8"))
    data: Any = card.data
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(data.base_model)):
        data.base_model = None
    return str(card).encode()
