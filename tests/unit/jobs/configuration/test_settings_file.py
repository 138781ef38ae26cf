"""batchmill.toml: read only if nobody else can have written it, told of, and one line whatever is in it."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from batchmill.jobs.broker.client import Broker
from batchmill.jobs.configuration.settings import environment_of, load_settings
from batchmill.jobs.errors import SettingsError

NOBODYS = 54_321


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "batchmill.toml"
    path.write_text("drain_seconds = 3\n")
    path.chmod(0o644)
    return path


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a file somebody else's; where only root could, the user becomes somebody else."""
    if os.geteuid() == 0:
        os.chown(path, NOBODYS, -1, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: NOBODYS)


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o400])
def test_the_users_own_file_is_read(toml: Path, mode: int) -> None:
    toml.chmod(mode)
    assert load_settings().drain_seconds == 3


def test_somebody_elses_file_is_refused(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_away(toml, monkeypatch)
    with pytest.raises(SettingsError, match=r"batchmill\.toml belongs to .*run `chown .* start in another folder$"):
        load_settings()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of root's")
def test_a_file_of_root_is_read_by_everybody(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: NOBODYS)
    assert load_settings().drain_seconds == 3


def test_somebody_elses_link_to_the_users_own_file_is_refused(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml.rename(toml.with_name("other.toml"))
    toml.symlink_to("other.toml")
    assert load_settings().drain_seconds == 3
    give_away(toml, monkeypatch)
    with pytest.raises(SettingsError, match="belongs to"):
        load_settings()


def test_the_users_own_link_to_somebody_elses_file_is_refused(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml.rename(toml.with_name("other.toml"))
    toml.symlink_to("other.toml")
    give_away(toml.with_name("other.toml"), monkeypatch)
    with pytest.raises(SettingsError, match="belongs to"):
        load_settings()


@pytest.mark.parametrize("mode", [0o646, 0o602, 0o666, 0o777])
def test_a_file_that_everybody_may_write_is_refused(toml: Path, mode: int) -> None:
    toml.chmod(mode)
    with pytest.raises(SettingsError, match=r"^everybody may write batchmill\.toml: .*`chmod go-w batchmill\.toml`$"):
        load_settings()


def test_a_file_that_a_group_may_write_is_read_if_it_is_the_users_primary_one(
    toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = pwd.getpwuid(os.geteuid())
    os.chown(toml, -1, me.pw_gid)
    toml.chmod(0o664)
    assert load_settings().drain_seconds == 3
    other = pwd.struct_passwd((me.pw_name, me.pw_passwd, me.pw_uid, me.pw_gid + 1, "", me.pw_dir, me.pw_shell))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: other)
    with pytest.raises(SettingsError, match=r"^a group may write batchmill\.toml: .*`chmod g-w batchmill\.toml`$"):
        load_settings()


GARBAGE = {
    "not UTF-8": b"\xff\xfe",
    "NUL": b"\0" * 100,
    "binary": bytes(range(256)) * 50,
    "not TOML": b"home = = 3\n",
    "deeply nested lists": b"home = " + b"[" * 15_000,
    "deeply nested tables": b"home = " + b"{a=" * 5_000,
    "deep closed lists": b"x = " + b"[" * 150 + b"]" * 150,
    "a long dotted key": b"a." * 8_000 + b"a = 1\n",
    "endless digits": b"engine_rows = " + b"9" * 10_000,
    "a table for a setting": b"[home]\nx = 1\n",
    "tables for settings": b"[[broker_url]]\nx = 1\n",
    "another type": b"home = 1979-05-27\n",
    "infinity": b"spool_bytes = inf\n",
    "not a number": b"lease_seconds = nan\n",
    "NUL in a path": b'home = "a\\u0000b"\n',
    "lines in a URL": b'broker_url = "redis://a\\nb"\n',
    "the home of nobody": b'home = "~no-such-user/x"\n',
    "an unknown name": b"colour = 'red'\n",
    "an unknown table": b"[tool.batchmill]\nx = 1\n",
    "a bad port": b"database_url = 'postgresql://mill:hunter2@host:port/db'\n",
    "a bad address": b"database_url = 'postgresql://mill:hunter2@[::1/db'\n",
    "a bad port of Redis": b"broker_url = 'redis://:hunter2@host:port/0'\n",
    "huge": b"# " + b"x" * 10_000_000,
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_one_line(toml: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCHMILL_HOME")
    toml.write_bytes(content)
    with pytest.raises(SettingsError) as refused:
        Broker.of(load_settings())
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300
    assert "hunter2" not in str(refused.value)


def test_what_is_no_file_is_one_line_too(toml: Path) -> None:
    toml.unlink()
    toml.mkdir()
    with pytest.raises(SettingsError, match="Is a directory"):
        load_settings()
    toml.rmdir()
    os.mkfifo(toml, 0o644)
    with pytest.raises(SettingsError, match=r"batchmill\.toml is not a file"):
        load_settings()
    toml.unlink()
    toml.symlink_to("nowhere")
    with pytest.raises(SettingsError, match=r"batchmill\.toml cannot be read: No such file"):
        load_settings()
    toml.unlink()
    toml.symlink_to("batchmill.toml")
    with pytest.raises(SettingsError, match="Too many levels of symbolic links"):
        load_settings()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_cannot_be_read_is_one_line(toml: Path) -> None:
    toml.chmod(0)
    with pytest.raises(SettingsError, match="Permission denied"):
        load_settings()


def test_garbage_ends_a_command_without_a_traceback(toml: Path) -> None:
    toml.write_bytes(GARBAGE["deeply nested lists"])
    done = subprocess.run([sys.executable, "-P", "-m", "batchmill", "jobs"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "batchmill: batchmill.toml: it is nested too deeply\n"


def test_a_file_that_names_places_is_told_of_and_their_values_are_not(
    toml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BATCHMILL_HOME")
    toml.write_text("home = 'secret-home'\nbroker_url = 'redis://:hunter2@host/0'\ndrain_seconds = 1\n")
    settings = load_settings()
    assert settings.home == toml.with_name("secret-home")
    assert capsys.readouterr().err == f"batchmill: {toml.resolve()} is read, which says home and broker_url\n"
    for name, value in environment_of(settings).items():
        monkeypatch.setenv(name, value)
    assert load_settings() == settings
    assert capsys.readouterr().err == "", "a process that another started has been told everything"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("home", "'place'"),
        ("broker_url", "'redis://host/0'"),
        ("broker_ca_file", "'ca.pem'"),
        ("broker_insecure", "true"),
        ("database_url", "'sqlite:////tmp/x.db'"),
    ],
)
def test_each_place_is_told_of(
    toml: Path, name: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BATCHMILL_HOME")
    toml.write_text(f"{name} = {value}\n")
    load_settings()
    assert capsys.readouterr().err == f"batchmill: {toml.resolve()} is read, which says {name}\n"


def test_a_file_that_names_no_place_is_read_in_silence(toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_settings()
    toml.write_text("home = 'overruled by the environment'\n")
    load_settings()
    assert capsys.readouterr().err == ""
