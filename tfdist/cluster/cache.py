"""The folder in which tfdist keeps what took time to make: wheels of Horovod, measurements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def cache_folder(cache_dir: Path | None, environ: Mapping[str, str]) -> Path:
    """Returns tfdist's cache folder.

    Args:
        cache_dir: The user's choice, or None.
        environ: The environment variables, of which TFDIST_CACHE_DIR and XDG_CACHE_HOME count.

    Example:
        >>> cache_folder(None, {"TFDIST_CACHE_DIR": "/shared/cache"})
        PosixPath('/shared/cache')
    """
    if cache_dir is not None:
        return cache_dir.expanduser().absolute()
    if environ.get("TFDIST_CACHE_DIR"):
        return Path(environ["TFDIST_CACHE_DIR"]).expanduser().absolute()
    home = environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "tfdist"
