"""`python -m worker`: the command line of the rooms that hold a device. Without a command it is a worker."""

import sys
from importlib import import_module

from jobs.isolation import isolate
from jobs.signals import exit_on_sigterm, raise_on_sigterm
from jobs.standard_files import hold_standard_files

#: The module whose `main` each command is.
COMMANDS = {"models": "worker.cli_models", "plan": "worker.cli_plan", "evaluate": "worker.cli_evaluate"}

if __name__ == "__main__":
    name = COMMANDS.get(sys.argv[1], "") if len(sys.argv) > 1 else ""
    raise_on_sigterm() if name else exit_on_sigterm()  # before the imports, which take a second
    hold_standard_files()
    isolate()
    if name:
        del sys.argv[1]
    import_module(name or "worker.cli").main()
