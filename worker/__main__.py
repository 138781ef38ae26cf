"""`python -m worker`: the command line of the rooms that hold a device."""

import signal
import sys

if __name__ == "__main__":
    # Before the imports, which take a second: there is nothing to hand back until Celery, or the supervisor,
    # takes the signal over.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    from worker.cli import main

    main()
