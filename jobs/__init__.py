"""Jobs: their values, their store and the messages about them; imports neither producer nor worker, and no torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    VERSION: str
else:

    def __getattr__(name: str) -> str:
        """Looks VERSION up on first use, since that takes longer than starting the command line."""
        if name != "VERSION":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            installed = version("batchmill")
        except PackageNotFoundError:  # a checkout that was never installed: `python -m batchmill` still works
            installed = "0+unknown"
        return globals().setdefault(name, installed)
