"""A SQLite store on a network file system is refused; where that cannot be told, it is warned of."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.errors import StoreError
from batchmill.jobs.runtime.files.disks import Disk, disk_of
from batchmill.migrations import revisions
from batchmill.producer.cli.main import cli


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the kernel's table of mounts says lies on a file system, as the file `kind` beside it says."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(proc))
    (tmp_path / "share").mkdir()
    return tmp_path / "share"


def mount(folder: Path, kind: str) -> None:
    lines = ["/dev/vda / ext4 rw 0 0", f"server:/x {folder} {kind} rw 0 0", f"tmpfs {folder}-not tmpfs rw 0 0"]
    (folder.parent / "proc" / "self" / "mounts").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "lustre", "ceph", "fuse.ceph", "fuse.s3fs", "glusterfs"]
)
def test_a_store_on_a_network_file_system_is_refused(mounted: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mount(mounted, kind)
    monkeypatch.setenv("BATCHMILL_HOME", str(mounted / "mine" / "home"))
    with pytest.raises(StoreError, match=f"lies on {kind}, a network file system.* set BATCHMILL_HOME"):
        revisions.open_store(load_settings())
    assert not (mounted / "mine" / "home" / "batchmill.db").exists()
    monkeypatch.setenv("BATCHMILL_DATABASE_URL", f"sqlite:///{mounted / 'store.db'}")
    done = CliRunner().invoke(cli, ["db", "upgrade"])
    assert (done.exit_code, "BATCHMILL_DATABASE_URL to a PostgreSQL" in done.output) == (1, True)
    with pytest.raises(StoreError, match=f"lies on {kind}"):
        revisions.open_store(load_settings())
    assert list(mounted.rglob("*.db")) == []


@pytest.mark.parametrize("kind", ["9p", "fuse", "fuse.something", "virtiofs", "vboxsf"])
def test_a_store_on_what_may_be_one_is_warned_of(
    mounted: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mount(mounted, kind)
    monkeypatch.setenv("BATCHMILL_HOME", str(mounted))
    revisions.open_store(load_settings()).close()
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count(f"lies on {kind}, which may be a network file system") == 1


@pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs", "overlay", "zfs", "btrfs", "fuseblk", "fuse.fuse-overlayfs"])
def test_a_store_on_a_disk_of_this_machine_is_made_without_a_word(
    mounted: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mount(mounted, kind)
    monkeypatch.setenv("BATCHMILL_HOME", str(mounted))
    revisions.open_store(load_settings()).close()
    assert capfd.readouterr().err == ""


def test_a_link_onto_a_network_file_system_and_a_disk_over_one_are_seen(mounted: Path, tmp_path: Path) -> None:
    mount(mounted, "nfs4")
    (tmp_path / "link").symlink_to(mounted)
    assert disk_of(tmp_path / "link" / "not" / "there") == (Disk.SHARED, "nfs4")
    assert disk_of(tmp_path) == (Disk.OWN, "ext4")
    with (tmp_path / "proc" / "self" / "mounts").open("a") as file:
        file.write(f"/dev/vdb {mounted} xfs rw 0 0\n")
    assert disk_of(mounted) == (Disk.OWN, "xfs")


def test_doctor_tells_of_it(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount(mounted, "nfs4")
    monkeypatch.setenv("BATCHMILL_HOME", str(mounted))
    monkeypatch.setattr("batchmill.producer.cli.doctor._libraries", lambda: iter(()))  # which takes torch's seconds
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 1
    assert "FAIL  database      the store" in done.output
    assert "nfs4, a network file system" in done.output
