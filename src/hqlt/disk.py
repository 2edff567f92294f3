"""Writing files safely: atomically, with locks, and with clear errors."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".unfinished"
"""Suffix of files and folders that are being written; they are renamed once they are completely on disk."""


def unfinished_path(path: Path) -> Path:
    """The temporary name of a file or folder while it is being written."""
    return path.with_name(path.name + UNFINISHED)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the contents of a file atomically: it has either the old or the new contents."""
    with explain_write_errors(path):
        try:
            write_synced(unfinished_path(path), data)
            unfinished_path(path).replace(path)
        finally:
            unfinished_path(path).unlink(missing_ok=True)
        sync_folder(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames within the folder durable, if the system supports it."""
    if os.name == "posix":
        sync(folder)


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Add the path, and how to continue, to an OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} could not be written: {error.strerror}. Everything finished before is kept; fix the problem and "
            f"run the same command again to resume",
        ) from error


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Raises OSError if a file (or folder) of this name cannot be written; changes nothing.

    To be called before long computations whose results are written at the end.
    """
    if path.exists() and path.is_dir() != folder:
        expected, found = ("folder", "file") if folder else ("file", "folder")
        raise OSError(None, f"expected a {expected}, found a {found}", str(path))
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if existing != path and not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{existing} is a file, not a folder", str(path))
    try:
        check_folder_writable(existing if existing.is_dir() else existing.parent)
        if existing.is_file():
            existing.open("ab").close()
    except OSError as error:
        raise OSError(error.errno, f"cannot be written there: {error.strerror}", str(path)) from None


def holds_files(folder: Path) -> bool:
    """Whether the folder has any files except unfinished ones of a killed process."""
    return any(not path.name.endswith(UNFINISHED) for path in folder.iterdir())


def check_folder_writable(folder: Path) -> None:
    """Raises OSError if no file can be written in the folder."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


@contextlib.contextmanager
def exclusive_folder(folder: Path) -> Iterator[None]:
    """Create the folder and lock it; raises ValueError if another process has locked it (if the system supports locks).

    Folders that were created here and are empty at the end, for example after an error, are removed.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found a file; give another name")
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            check_folder_writable(folder)  # it may exist and be read-only
        with folder_lock(folder):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in created:
                path.rmdir()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Create the folder, which must be new or empty; it is emptied if an error occurs within the context.

    Raises FileExistsError if it is not empty, OSError if it cannot be written.
    """
    with exclusive_folder(folder):
        if holds_files(folder):
            raise FileExistsError(
                f"{folder}: expected a new or empty folder, because nothing is overwritten; give another folder"
            )
        try:
            yield
        except BaseException:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise


@contextlib.contextmanager
def folder_lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock the folder against other processes and threads, if the system supports it. wait: instead of ValueError."""
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise ValueError(
            f"{folder}: another process is using this folder; wait for it, stop it, or give another folder"
        ) from None
    else:
        yield
    finally:
        os.close(handle)
