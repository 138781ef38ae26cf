"""bitsandbytes without the compiler that it would load for other devices."""

from __future__ import annotations

import json
import subprocess
import sys

LOOK = """
import json, sys, torch
compiler = torch.compile
from batchmill.worker.models.quantization.uncompiled import import_bitsandbytes
import_bitsandbytes()
import bitsandbytes.backends.default.ops
print(json.dumps(["torch._inductor.compile_fx" in sys.modules, torch.compile is compiler]))
"""


def test_the_compiler_is_not_imported_and_stays_for_others() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", LOOK], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, True]
