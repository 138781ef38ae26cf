"""`python -m batchmill.worker`: the command line of the rooms that hold a device. Without a command it is a worker."""

import sys

from batchmill.jobs.runtime.process.isolation import isolate
from batchmill.jobs.runtime.process.signals import exit_on_sigterm, raise_on_sigterm
from batchmill.jobs.runtime.process.standard_files import hold_standard_files

#: By command, the module whose `main` it is.
MODULES = {
    "worker": "batchmill.worker.cli.worker",
    "models": "batchmill.worker.cli.models",
    "plan": "batchmill.worker.cli.plan",
    "evaluate": "batchmill.worker.cli.evaluate",
}

if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == [] or words[0] not in MODULES:
        words.insert(0, "worker")
    exit_on_sigterm() if words[0] == "worker" else raise_on_sigterm()  # before the imports, which take a second
    hold_standard_files()
    isolate()
    from batchmill.worker.cli.commands import Room

    Room(MODULES).main(words, prog_name="batchmill")
