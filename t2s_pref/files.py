"""Files that are either whole or not there."""

import glob
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from t2s_pref.errors import UserError


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO]:
    """Open a temporary file that takes the name `path` only once it is complete and on disk.

    A reader sees the old content or the new, never a part of it; on any error the temporary file is removed and `path`
    stays as it was. What a killed process left of an earlier try is removed first. Text is UTF-8 with `\\n` line ends.
    The parent folder is made where it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    # Hidden, and in the same folder: a rename is atomic only within one file system. Long names are cut, so that the
    # temporary one stays within what a file system allows.
    prefix = own_prefix(path.parent, f".{path.name[:40]}.part-")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix)
    try:
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private; a result is shared like any other file
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def check_writable(path: Path) -> None:
    """Raise [`UserError`] where no file of this name can be made: now, not after hours of work."""
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; give a file in it.")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "may not be written" if nearest.is_dir() else "is a file, not a folder"
        raise UserError(f"{str(path)!r} cannot be made: {str(nearest)!r} {reason}.")


def own_prefix(folder: Path, prefix: str) -> str:
    """`prefix` with this process's mark, for temporary names in `folder`; those of dead processes are removed there."""
    mine = f"{prefix}{socket.gethostname()}-"
    for left in folder.glob(f"{glob.escape(mine)}*"):
        if not _alive(left.name.removeprefix(mine).partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return f"{mine}{os.getpid()}-"


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        pass
    return True


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames and new names in `folder` survive a power cut, where the system can open a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def public_name(name: str) -> str:
    """A name that a server gives a model, without the folders where it is one's path."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if looks_local(name) else name


def looks_local(name: str | os.PathLike[str]) -> bool:
    """Whether `name` means a path of this machine rather than an `owner/name` of the Hub.

    An existing path always does. A missing one does where a Hub id could not be written like it: absolute, starting
    with `.` or `~`, of more than two parts, with a backslash, or ending in a file type of data.
    """
    if not isinstance(name, str) or os.path.exists(name):
        return True
    return (
        name.startswith(("/", ".", "~"))
        or name.count("/") > 1
        or "\\" in name
        or name.endswith(("/", ".json", ".jsonl", ".ndjson"))
    )
