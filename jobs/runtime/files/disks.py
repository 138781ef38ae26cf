"""The kind of disk that a folder lies on: SQLite's locks hold on one machine's own, and not between machines.

It looks at what is mounted, and knows no store.
"""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path

import psutil

#: File systems that other machines may write at the same time.
_SHARED = frozenset({
    "afs", "beegfs", "ceph", "cifs", "coda", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2",
    "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs", "wekafs",
})  # fmt: skip
#: The same, by a program behind FUSE.
_SHARED_FUSE = frozenset({
    "blobfuse2", "ceph", "ceph-fuse", "davfs2", "gcsfuse", "glusterfs", "goofys", "juicefs", "mfs", "mount-s3",
    "rclone", "s3fs", "smbnetfs", "sshfs",
})  # fmt: skip
#: Programs behind FUSE that write to their own machine's disks.
_OWN_FUSE = frozenset({"bindfs", "encfs", "exfat", "fuse-overlayfs", "gocryptfs", "mergerfs", "ntfs", "ntfs-3g"})
#: A folder of the host, as a virtual machine or WSL sees it, which may lie on anything.
_OF_A_HOST = frozenset({"9p", "drvfs", "fuse", "prl_fs", "vboxsf", "virtiofs", "vmhgfs"})


class Disk(Enum):
    OWN = "own"
    SHARED = "shared"  #: a network file system
    UNKNOWN = "unknown"  #: one that may be on a network, or not


def disk_of(path: Path) -> tuple[Disk, str]:
    """The kind of disk under a path, which need not be there yet, and its name as the kernel has it."""
    place = Path(os.path.realpath(path))
    longest, file_system = "", ""
    for each in psutil.disk_partitions(all=True):
        # Of several that are mounted over one folder the last is seen.
        if place.is_relative_to(each.mountpoint) and len(each.mountpoint) >= len(longest):
            longest, file_system = each.mountpoint, each.fstype
    return _kind(file_system), file_system


def _kind(name: str) -> Disk:
    program = name.removeprefix("fuse.") if name.startswith("fuse.") else None
    if name in _SHARED or program in _SHARED_FUSE:
        return Disk.SHARED
    if name in _OF_A_HOST or (program is not None and program not in _OWN_FUSE):
        return Disk.UNKNOWN
    return Disk.OWN
