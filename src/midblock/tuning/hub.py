"""Uploading an exported adapter to the Hugging Face hub; nothing is uploaded unless it is asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePath
from typing import Any

from midblock.errors import OutputError, SettingsError
from midblock.models.quiet import first_line
from midblock.reading import read_json
from midblock.settings.base import name_of

__all__ = ["push_adapter", "require_hub"]

_CONFIG = "adapter_config.json"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


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
    """Upload an adapter's folder with its card, whole, as one commit; no path of this machine goes with it.

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
    base = str(read_json(folder / _CONFIG, error=OutputError).get("base_model_name_or_path"))
    changed = {} if _HUB_NAME.fullmatch(base) else {"README.md": _card, _CONFIG: _config}
    files = [CommitOperationAdd(p.name, changed[p.name](p, base) if p.name in changed else p)
             for p in sorted(folder.iterdir())]
    try:
        address = str(api.create_repo(repo, private=True, exist_ok=True))
        api.create_commit(repo, files, commit_message="Adapter made with midblock")
    except Exception as error:  # of the network, the hub, or the client: the adapter itself is finished
        raise OutputError(f"the adapter is in {folder}, but uploading it to {repo} failed: {first_line(error)} "
                          f"Upload it later with `hf upload {repo} {folder}`.") from error
    return address


def _card(path: Path, base: str) -> bytes:
    """The card of an adapter whose base is a folder of this machine: named by its last part, which is no name on the
    hub."""
    from huggingface_hub import ModelCard

    card = ModelCard(path.read_text(encoding="utf-8").replace(base, PurePath(base).name))
    data: Any = card.data
    data.base_model = None
    return str(card).encode()


def _config(path: Path, base: str) -> bytes:
    """The adapter's config, its base named likewise."""
    config = read_json(path, error=OutputError)
    return json.dumps({**config, "base_model_name_or_path": PurePath(base).name}, indent=2).encode()
