"""Files that are whole or not there: atomic writes and digests, used by every room that writes."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

_CHUNK_BYTES = 2**24

# No other machine can write there: what this one's kernel says of locks and of open files is the whole truth.
LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "ramfs"}


def write_atomically(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, also when the machine stops in between.

    Temporary file in the same folder, fsync, rename, fsync of the folder. Raises OSError; nothing is left behind then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def not_writable(folder: Path, error: OSError) -> str:
    """The sentence for a run folder on a disk that is full or read-only."""
    return (
        f"The run folder {folder} cannot be written ({error.strerror}): make room or make it writable, or choose "
        "another --out."
    )


def file_system(folder: Path) -> str:
    """The type of the file system that holds a folder, such as "ext4"; "" where that cannot be told."""
    import psutil

    whole = folder.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[place] for place in (whole, *whole.parents) if place in mounts), "")


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path, progress: Callable[[], None] = lambda: None) -> str:
    """The digest of a whole file, in hexadecimal; progress is called after every 16 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress()
    return digest.hexdigest()
