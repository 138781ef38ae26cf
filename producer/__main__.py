"""`python -m producer`: the batchmill command where its script is not installed."""

from producer.cli import main

if __name__ == "__main__":
    main()
