"""The batchmill command: the entry point of its script, and of `python -m batchmill` where that is not installed.

It imports nothing before the current folder has left the import path: a file of the user's named `jobs.py` or
`json.py` must not run in place of the real one.
"""

import gc
import os
import site
import sys

#: Importing makes some hundred thousand objects that stay; to look through them 700 by 700 takes a tenth of `status`.
_OBJECTS_BETWEEN_COLLECTIONS = 50_000


def main() -> None:
    """Runs one command."""
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    _leave_current_folder()
    from batchmill.jobs.runtime.process.signals import exit_on_sigterm

    if sys.argv[1:2] in (["worker"], ["up"]):
        exit_on_sigterm()  # what these do is never finished, so to end it early is no failure
    from batchmill.jobs.runtime.process.isolation import isolate
    from batchmill.jobs.runtime.process.standard_files import hold_standard_files

    hold_standard_files()
    isolate()
    from batchmill.producer.cli import main

    main.main()


def _leave_current_folder() -> None:
    """Takes the current folder, and what PYTHONPATH names relative to it, out of the import path.

    Python has made absolute paths of these by now, so one that is also named as such stays; so do the folders that
    hold Python and batchmill themselves.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:
        return  # it was deleted: nothing can be imported from it
    written = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    relative = {here} | {os.path.abspath(entry) for entry in written if not os.path.isabs(entry)}
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if own in relative:
        # A checkout that was never installed, which what is started from it finds by name.
        os.environ["PYTHONPATH"] = os.pathsep.join([own, *written])
    named = {os.path.abspath(entry) for entry in written if os.path.isabs(entry)}
    kept = named | {own, os.path.dirname(os.__file__), *site.getsitepackages()}
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) not in relative - kept]


if __name__ == "__main__":
    main()
