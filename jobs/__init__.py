"""What a job is, where it is kept and how it is sent; imports neither producer nor worker, and no torch."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("batchmill")
except PackageNotFoundError:  # a checkout that was never installed: `python -m producer` still works
    VERSION = "0+unknown"
