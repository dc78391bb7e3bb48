"""The two keys, and where they come from: a flag, a file, or the environment. Not responsible for what they open.

They alone may come from the environment, because flags show in process lists.
"""

import os
from pathlib import Path

from diptych.errors import ConfigError

VARIABLES = {"api_key": "DIPTYCH_API_KEY", "cluster_key": "DIPTYCH_CLUSTER_KEY"}
MIN_KEY = 16  # characters of a cluster key; whoever hears a handshake may guess for as long as they like


def key_of(flag: str | None) -> str | None:
    """The API key: of a flag, else of the environment."""
    return flag if flag is not None else os.environ.get(VARIABLES["api_key"]) or None


def read_key(key: str | None, key_file: str | None) -> str:
    """The cluster's key from a flag, a file or the environment; ConfigError where there is none."""
    given = cluster_key(key, key_file) or (None if key_file else os.environ.get(VARIABLES["cluster_key"]))
    if not given:
        raise ConfigError("no cluster key: give --key-file FILE, or set DIPTYCH_CLUSTER_KEY")
    return given


def cluster_key(key: str | None, key_file: str | None) -> str | None:
    """The cluster's key from a flag or a file, if either is given; ConfigError where it cannot be one."""
    if key is not None and key_file is not None:
        raise ConfigError("give the cluster's key, or a file that holds it, not both")
    if key_file is not None:
        try:
            key = Path(key_file).expanduser().read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the cluster's key from {key_file}: {error}") from None
    if key is not None and len(key) < MIN_KEY:
        raise ConfigError(f"a cluster key has at least {MIN_KEY} characters, like what `openssl rand -hex 16` prints")
    return key
