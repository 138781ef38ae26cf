"""The environment of a batchmill process, cleaned of what other projects and the current folder would put into it.

An entry point calls `isolate` before it imports Celery, which reads variables of its own as it is imported. What this
process starts inherits the clean environment.
"""

from __future__ import annotations

import os

#: Lists of folders, in which an empty or relative entry stands for the current folder or for one in it.
_FOLDER_LISTS = ("LD_LIBRARY_PATH", "PATH", "PYTHONPATH")
_PREFIXES = ("CELERY_", "CELERYD_", "KOMBU_", "_MP_FORK_")
#: Other names that Celery, kombu and billiard read: some import code, some stop a worker from working or ending.
_NAMES = frozenset(
    {
        "AUTOSCALE_KEEPALIVE",
        "C_BENCH",
        "C_BENCH_EVERY",
        "C_FAKEFORK",
        "C_FORCE_ROOT",
        "C_IMPDEBUG",
        "C_REMDEBUG",
        "C_STRICT_APP",
        "C_WARN_APP",
        "C_WNOCONF",
        "DISABLE_TRACEBACKS",
        "DJANGO_PROJECT_DIR",
        "DJANGO_SETTINGS_MODULE",
        "EVENTLET_NOBLOCK",
        "FORKED_BY_MULTIPROCESSING",
        "MP_LOG",
        "MP_MAIN_FILE",
        "MULTIPROCESSING_FORKING_DISABLE",
        "NOSETPS",
        "PICKLE_PROTOCOL",
        "REMAP_SIGTERM",
        "TIMER_DEBUG",
        "USE_FAST_LOCALS",
    }
)
#: The tracker of a process that was killed warns that it cleans up after it, which is no fault.
_EXPECTED_WARNINGS = "ignore:semaphore_tracker:UserWarning,ignore:resource_tracker:UserWarning"


def isolate() -> None:
    """Removes variables that would bring in foreign code or override batchmill's settings from the environment."""
    for name in [name for name in os.environ if is_foreign(name)]:
        del os.environ[name]
    for name in _FOLDER_LISTS:
        if name in os.environ:
            absolute = [entry for entry in os.environ[name].split(os.pathsep) if os.path.isabs(entry)]
            os.environ[name] = os.pathsep.join(absolute)
    # For the interpreters that libraries start: billiard's spawn, say, runs `python -c`.
    os.environ["PYTHONSAFEPATH"] = "1"
    if _EXPECTED_WARNINGS not in (written := os.environ.get("PYTHONWARNINGS", "")):
        os.environ["PYTHONWARNINGS"] = f"{written},{_EXPECTED_WARNINGS}".removeprefix(",")


def is_foreign(name: str) -> bool:
    """True for a variable of Celery, kombu, billiard or Django, none of which the user addresses here."""
    return name in _NAMES or name.startswith(_PREFIXES)
