"""The W&B server that this machine uses, and whether there is a login for it. Importable without wandb."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from configparser import ConfigParser
from configparser import Error as ConfigError
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

CLOUD = "https://api.wandb.ai"
PATIENCE = 3.0  # seconds to reach the server


def server_url(environ: Mapping[str, str] = os.environ) -> str:
    """The server's address: ``WANDB_BASE_URL``, or what ``wandb login --host`` has stored, or W&B's own."""
    if environ.get("WANDB_BASE_URL"):
        return environ["WANDB_BASE_URL"].rstrip("/")
    folder = environ.get("WANDB_CONFIG_DIR") or _home(environ) / ".config" / "wandb"
    for path in (Path(environ.get("WANDB_DIR") or ".") / "wandb" / "settings", Path(folder) / "settings"):
        parser = ConfigParser(interpolation=None)
        try:
            parser.read(path)
        except (OSError, ConfigError, UnicodeDecodeError):
            continue
        if url := parser.get("default", "base_url", fallback=""):
            return url.rstrip("/")
    return CLOUD


def logged_in(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether there is a login for the server: in the environment, or in the netrc file, where ``wandb login`` stores
    it. Keys are not read."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    name = "_netrc" if sys.platform == "win32" else ".netrc"
    try:
        return (
            urlsplit(server_url(environ)).netloc in netrc(environ.get("NETRC") or _home(environ) / name).hosts
        )
    except (OSError, NetrcParseError, UnicodeDecodeError):
        return False


def reachable(url: str) -> bool:
    """Whether a connection to the server at ``url`` can be opened from this machine."""
    parts = urlsplit(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME") or Path.home())
