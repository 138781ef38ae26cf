"""The real command, for jobs of the second echo queue.

`python -m tests.tools.soak.producer submit FILE -m echo -q nf4`
"""

from __future__ import annotations

from tests.tools.soak.worker import let_echo_have_twins

if __name__ == "__main__":
    let_echo_have_twins()
    from batchmill.producer.cli.main import main

    main()
