"""`python -m worker`: the command line of the rooms that hold a device."""

from worker.cli import main

if __name__ == "__main__":
    main()
