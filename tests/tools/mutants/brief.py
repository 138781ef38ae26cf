"""A plugin of pytest for mutants: hypothesis says that a history fails, and does not look for a shorter one."""

from __future__ import annotations

from hypothesis import Phase, settings

settings.register_profile("brief", phases=[Phase.generate], report_multiple_bugs=False)
settings.load_profile("brief")
