"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mri_posterior.errors import UserError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    The content is flushed to disk before the rename, so a power cut leaves the old file or the new one.

    Raises
    ------
    UserError: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}): free space or choose another --output"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def require_free_space(folder: str | Path, n_bytes: int) -> None:
    """Refuse to start writing `n_bytes` where they cannot fit, so that hours of work do not end on a full disk.

    `folder` need not exist yet: the disk of its nearest existing parent counts.

    Raises
    ------
    UserError: fewer than `n_bytes` are free.
    """
    folder = Path(folder).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise UserError(
            f"{folder}: needs {n_bytes:,} bytes but {free:,} are free: free space or choose another --output"
        )


def require_writable(folder: str | Path) -> None:
    """Make `folder` if need be and refuse to start work whose results could not be written there.

    Raises
    ------
    UserError: the folder cannot be made or written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}): choose another --output") from error
