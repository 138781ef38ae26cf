"""`python -m worker`: the command line of the rooms that hold a device. Without a command it is a worker."""

import signal
import sys
from importlib import import_module

#: The module whose `main` each command is.
COMMANDS = {"models": "worker.cli_models", "plan": "worker.cli_plan", "evaluate": "worker.cli_evaluate"}

if __name__ == "__main__":
    # Before the imports, which take a second: there is nothing to hand back until Celery, or the supervisor,
    # takes the signal over.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    name = COMMANDS.get(sys.argv[1], "") if len(sys.argv) > 1 else ""
    if name:
        del sys.argv[1]
    import_module(name or "worker.cli").main()
