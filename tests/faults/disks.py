"""Small disks of their own below a test's folder, which can be filled, made read-only, or fail."""

import contextlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

PAGE_BYTES = 4096


def can_mount(folder: Path) -> bool:
    """Whether this process may mount: root in a container often may not."""
    if os.geteuid() != 0:
        return False
    try:
        SmallDisk(folder).unmount()
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


class SmallDisk:
    """A tmpfs of 128 MiB, mounted at a folder, which is made where it is missing."""

    SIZE_BYTES, FILES = 128 * 2**20, 10_000

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={self.SIZE_BYTES},nr_inodes={self.FILES}", "small", str(folder))

    def leave(self, room_bytes: int = SIZE_BYTES, files: int = FILES) -> None:
        """From now on only so many more bytes (in whole pages) and files and folders fit."""
        for attempt in range(20):
            status = os.statvfs(self.folder)
            used_bytes = (status.f_blocks - status.f_bfree) * status.f_frsize
            used_files = status.f_files - status.f_ffree
            try:
                self._remount(f"size={used_bytes + room_bytes},nr_inodes={used_files + files}")
            except subprocess.CalledProcessError:  # a run has written meanwhile, and more is used than would fit
                if attempt == 19:
                    raise
            else:
                return

    def read_only(self) -> None:
        """Fails while a file on it is open for writing."""
        self._remount("ro")

    def writable(self) -> None:
        """After `read_only`."""
        self._remount("rw")

    def unmount(self) -> None:
        """Also while something is open on it."""
        _run("umount", "-l", str(self.folder))

    def _remount(self, options: str) -> None:
        _run("mount", "-o", f"remount,{options}", str(self.folder))


class FailingDisk:
    """An ext4 in a file; after `fail` the kernel lets nobody write, as it does when a real disk has failed it."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.folder, self.image = folder, image
        folder.mkdir(parents=True, exist_ok=True)
        with image.open("wb") as file:
            file.truncate(64 * 2**20)
        _run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", str(image))
        self.mount()

    def mount(self) -> None:
        """Checks and mounts it."""
        subprocess.run(["e2fsck", "-p", "-f", str(self.image)], check=False, capture_output=True)  # 1: mended
        _run("mount", "-o", "loop,errors=remount-ro", str(self.image), str(self.folder))

    def fail(self) -> None:
        """An error of the file system, at the kernel's own door for testing them."""
        device = _run("findmnt", "-n", "-o", "SOURCE", str(self.folder)).strip()
        Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error").write_text("1", encoding="ascii")

    def unmount(self) -> None:
        """Also while something is open on it."""
        _run("umount", "-l", str(self.folder))


def pages(*sizes_bytes: int) -> int:
    """The bytes that files of these sizes take on a tmpfs."""
    return sum(-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes_bytes)


def quietly(function: Callable[[], None]) -> None:
    """For cleaning up what may be gone already."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        function()


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
