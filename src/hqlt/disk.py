"""Writing that a kill, a full disk or a second process cannot spoil."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".unfinished"
"""What is being written has this behind its name, and is moved to its place when all of it is on disk."""


def unfinished_path(path: Path) -> Path:
    """Where a file or folder is written before it has its name."""
    return path.with_name(path.name + UNFINISHED)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file in one step: it holds what it held, or all of the data."""
    with explain_write_errors(path):
        try:
            write_synced(unfinished_path(path), data)
            unfinished_path(path).replace(path)
        finally:
            unfinished_path(path).unlink(missing_ok=True)
        sync_folder(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make moves within the folder last through a loss of power, where the system can."""
    if os.name == "posix":
        sync(folder)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} could not be written: {error.strerror}. What was finished before is kept: once this is mended, "
            f"the same command resumes from there",
        ) from error


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Raises OSError where a file (or folder) of this name could not be written; leaves everything as it was.

    For what is written at the end of hours of work, before they begin.
    """
    if path.exists() and path.is_dir() != folder:
        wanted, found = ("folder", "file") if folder else ("file", "folder")
        raise OSError(None, f"expected a {wanted}, found a {found}", str(path))
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if there != path and not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file, not a folder", str(path))
    try:
        check_folder_writable(there if there.is_dir() else there.parent)
        if there.is_file():
            there.open("ab").close()
    except OSError as error:
        raise OSError(error.errno, f"cannot be written there: {error.strerror}", str(path)) from None


def holds_files(folder: Path) -> bool:
    """Whether there is anything in it but what a kill left unfinished."""
    return any(not path.name.endswith(UNFINISHED) for path in folder.iterdir())


def check_folder_writable(folder: Path) -> None:
    """Raises OSError where no file can be written in a folder, before work is done for it."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


@contextlib.contextmanager
def exclusive_folder(folder: Path) -> Iterator[None]:
    """Make the folder, and refuse it while another process works in it (where the system can tell).

    A folder made here that is still empty at the end is removed, for instance because a command failed.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found a file; give another name")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            check_folder_writable(folder)  # it may be there and read-only
        with folder_lock(folder):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make the folder, which is to be new or empty, and leave nothing in it where what is written is not whole.

    Raises FileExistsError where it holds something, OSError where it cannot be written.
    """
    with exclusive_folder(folder):
        if holds_files(folder):
            raise FileExistsError(
                f"{folder}: expected a new or empty folder, because nothing is overwritten; name another"
            )
        try:
            yield
        except BaseException:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise


@contextlib.contextmanager
def folder_lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep others out who lock the folder, too, processes and threads, or wait for them (where the system can)."""
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise ValueError(
            f"{folder}: another process is at work there; wait for it, end it, or give another folder"
        ) from None
    else:
        yield
    finally:
        os.close(handle)
