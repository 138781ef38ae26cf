"""`python -m worker`: the command line of the rooms that hold a device. Without a command it is a worker."""

import sys

from jobs.isolation import isolate
from jobs.signals import exit_on_sigterm, raise_on_sigterm
from jobs.standard_files import hold_standard_files

#: The module whose `main` each command is.
MODULES = {
    "worker": "worker.cli",
    "models": "worker.cli_models",
    "plan": "worker.cli_plan",
    "evaluate": "worker.cli_evaluate",
}

if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == [] or words[0] not in MODULES:
        words.insert(0, "worker")
    exit_on_sigterm() if words[0] == "worker" else raise_on_sigterm()  # before the imports, which take a second
    hold_standard_files()
    isolate()
    from worker.commands import Room

    Room(MODULES).main(words, prog_name="batchmill")
