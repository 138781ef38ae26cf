"""Settings: their sources, the order of precedence, and refused values."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from batchmill.jobs.configuration.flags import ENGINE_FLAGS, FLAG_OF_SETTING
from batchmill.jobs.configuration.settings import Settings, environment_of, load_settings
from batchmill.jobs.errors import SettingsError
from batchmill.jobs.runtime.home import socket_path
from batchmill.worker.engine.options import Dequantize, EngineChoice


def test_flags_win_over_environment_over_file_over_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_settings().stall_seconds == 600
    (tmp_path / "batchmill.toml").write_text("stall_seconds = 1\nheartbeat_seconds = 1.5\ndrain_seconds = 1\n")
    monkeypatch.setenv("BATCHMILL_STALL_SECONDS", "2")
    monkeypatch.setenv("BATCHMILL_HEARTBEAT_SECONDS", "2")
    settings = load_settings(stall_seconds=3.0, lease_seconds=None)
    assert (settings.stall_seconds, settings.heartbeat_seconds, settings.drain_seconds) == (3.0, 2.0, 1.0)
    assert settings.lease_seconds == 60.0


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("BATCHMILL_LEASE_SECONDS", "soon", "BATCHMILL_LEASE_SECONDS"),
        ("BATCHMILL_LEASE_SECONDS", "-1", "BATCHMILL_LEASE_SECONDS"),
        ("BATCHMILL_LEASE_SECONDS", "inf", "BATCHMILL_LEASE_SECONDS"),
        ("BATCHMILL_HEARTBEAT_SECONDS", "1e300", "BATCHMILL_HEARTBEAT_SECONDS"),
        ("BATCHMILL_STALL_SECONDS", "nan", "BATCHMILL_STALL_SECONDS"),
        ("BATCHMILL_LEASE_SECONDS", "2", "at least 4 times save_seconds"),
        ("BATCHMILL_LEASE_SECOND", "60", "did you mean BATCHMILL_LEASE_SECONDS"),
        ("BATCHMILL_BROKER_URL", "amqp://host", "BATCHMILL_BROKER_URL: must begin with redis://"),
        ("BATCHMILL_DATABASE_URL", "mysql://host", "BATCHMILL_DATABASE_URL: must begin with sqlite"),
        ("BATCHMILL_DATABASE_URL", "nonsense", "BATCHMILL_DATABASE_URL: must begin with sqlite"),
        ("BATCHMILL_LOG_LEVEL", "loud", "BATCHMILL_LOG_LEVEL"),
        ("BATCHMILL_ENGINE", "fast", "BATCHMILL_ENGINE: .*'auto', 'continuous' or 'generate'"),
        ("BATCHMILL_ENGINE_ROWS", "0", "BATCHMILL_ENGINE_ROWS"),
        ("BATCHMILL_CONTEXT_TOKENS", "0", "BATCHMILL_CONTEXT_TOKENS"),
        ("BATCHMILL_GPU_MEMORY_FRACTION", "0", "BATCHMILL_GPU_MEMORY_FRACTION"),
        ("BATCHMILL_GPU_MEMORY_FRACTION", "1.1", "BATCHMILL_GPU_MEMORY_FRACTION"),
        ("BATCHMILL_GPU_MEMORY_FRACTION", "nan", "BATCHMILL_GPU_MEMORY_FRACTION"),
        ("BATCHMILL_DEQUANTIZE", "sometimes", "BATCHMILL_DEQUANTIZE: .*'auto', 'never' or 'always'"),
        ("BATCHMILL_DETERMINISTIC", "perhaps", "BATCHMILL_DETERMINISTIC"),
    ],
)
def test_a_bad_value_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=said):
        load_settings()


def test_a_bad_value_of_a_flag_is_refused_by_the_flag_even_where_the_environment_has_a_good_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BATCHMILL_ENGINE_ROWS", "4")
    with pytest.raises(SettingsError, match=r"^--max-rows: ") as refused:
        load_settings(engine_rows="0", deterministic=True)
    assert "BATCHMILL" not in str(refused.value)


def test_every_flag_gives_a_setting_and_no_two_the_same() -> None:
    assert len(FLAG_OF_SETTING) == len(ENGINE_FLAGS)
    assert set(FLAG_OF_SETTING) <= set(Settings.model_fields)


def test_the_engine_has_every_word_of_the_settings() -> None:
    for name, words in (("engine", EngineChoice), ("dequantize", Dequantize)):
        assert get_args(Settings.model_fields[name].annotation) == tuple(word.value for word in words)


def test_a_refused_url_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHMILL_DATABASE_URL", "mysql://user:hunter2@host/db")
    with pytest.raises(SettingsError) as refused:
        load_settings()
    assert "hunter2" not in str(refused.value)


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    toml = tmp_path / "batchmill.toml"
    toml.write_text("lease_second = 3\n")
    with pytest.raises(SettingsError, match=r"unknown setting lease_second in batchmill\.toml"):
        load_settings()
    toml.write_text("lease_seconds = = 3\n")
    with pytest.raises(SettingsError, match=r"batchmill\.toml"):
        load_settings()


def test_a_process_started_with_the_environment_of_settings_has_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(
        lease_seconds=7.5,
        database_url="sqlite:////tmp/x.db",
        engine="generate",
        engine_rows=3,
        context_tokens=100,
        gpu_memory_fraction=0.5,
        dequantize="always",
        deterministic=True,
    )
    for name, value in environment_of(settings).items():
        monkeypatch.setenv(name, value)
    assert load_settings() == settings


def test_embedded_defaults_lie_under_home(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path)
    assert settings.database == f"sqlite:///{tmp_path}/batchmill.db"
    assert settings.broker == f"redis+socket://{tmp_path}/redis.sock"
    assert settings.embedded_broker
    assert settings.embedded_store


def test_a_long_home_gets_a_short_socket(tmp_path: Path) -> None:
    path = socket_path(tmp_path / ("x" * 150))
    assert len(str(path)) <= 107
    assert path == socket_path(tmp_path / ("x" * 150))
    assert path != socket_path(tmp_path / ("y" * 150))


def test_every_timer_is_a_setting_with_a_description() -> None:
    for name, each in Settings.model_fields.items():
        if name.endswith("_seconds"):
            assert each.description, name
