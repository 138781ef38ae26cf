"""The line that moves while a job is waited for: the parts that a narrow terminal leaves out, and those that stay."""

from __future__ import annotations

import re
import sys
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from batchmill.jobs.configuration.settings import environment_of, load_settings
from batchmill.migrations.revisions import open_store
from batchmill.producer.cli.text.live_line import LiveLine
from tests.support.paths import ROOT
from tests.support.processes.terminal import Terminal
from tests.support.store import mill

BAR = "━"
#: A code that sets a color, of the foreground or the background.
COLOR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:[349]|10)[0-9][0-9;]*m")
ADVICE = ("no live worker has served demo (nf4) for 2 min 20 s; start one:", "batchmill up -m demo -q nf4")
RUNNING = LiveLine("5ht7666w running", 1_200, 3_200, "12.3 requests/s, ends in about 2 min 39 s")
WAITING = LiveLine("5ht7666w queued", 0, 3_200, "", ADVICE)


def shown(line: LiveLine, width: int) -> list[str]:
    console = Console(file=StringIO(), width=width, force_terminal=True, color_system="truecolor", no_color=True)
    with console.capture() as capture:
        console.print(line)
    return capture.get().splitlines()


def test_a_wide_terminal_has_all_in_one_line() -> None:
    (line,) = shown(RUNNING, 120)
    assert BAR in line
    assert line.rstrip().endswith("1,200/3,200 ended, 12.3 requests/s, ends in about 2 min 39 s")


def test_a_narrower_one_drops_the_bar_first() -> None:
    assert shown(RUNNING, 80) == ["5ht7666w running 1,200/3,200 ended, 12.3 requests/s, ends in about 2 min 39 s"]


def test_then_the_note_goes_to_a_line_of_its_own() -> None:
    assert shown(RUNNING, 60) == ["5ht7666w running 1,200/3,200 ended", "12.3 requests/s, ends in about 2 min 39 s"]


def test_advice_has_lines_of_its_own_beside_any_bar() -> None:
    assert shown(WAITING, 120)[1:] == list(ADVICE)
    assert shown(WAITING, 70)[1:] == list(ADVICE)


@given(
    st.integers(20, 200),
    st.builds(
        LiveLine,
        st.sampled_from(["5ht7666w running", "[b]5ht7666w[/b] queued"]),
        st.integers(0, 10**6),
        st.integers(10**6, 10**9),
        st.sampled_from(["", RUNNING.note]),
        st.sampled_from([(), ADVICE, ("voilà [red] 模型 …",)]),
    ),
)
def test_nothing_of_the_text_is_lost_at_any_width(width: int, line: LiveLine) -> None:
    lines = shown(line, width)
    assert all(cell_len(each) <= width for each in lines)
    text = " ".join(lines).replace(BAR, "").replace("╸", "").replace("╺", "").replace(",", "")
    words = f"{line.title} {line.done}/{line.total} ended {line.note} {' '.join(line.advice)}".replace(",", "")
    assert "".join(text.split()) == "".join(words.split())
    if len(f"{line.done:,}/{line.total:,}") <= width:  # a wider one is broken in two
        assert text.split() == words.split()


@pytest.fixture
def job_id() -> str:
    """A job that nobody works on, in the store of the settings."""
    store = open_store(load_settings())
    job_id = mill.load(store, 4_000)
    store.close()
    return job_id


def wait(job_id: str, *words: str, columns: int = 120, **environ: str) -> Terminal:
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "src"), **environment_of(load_settings()), **environ}
    return Terminal([sys.executable, "-P", "-m", "batchmill", "wait", job_id, *words], env=env, columns=columns)


@pytest.mark.parametrize(("columns", "has_bar"), [(120, True), (30, False)])
def test_wait_in_a_real_terminal(columns: int, has_bar: bool, job_id: str) -> None:
    with wait(job_id, "--timeout", "3", columns=columns) as terminal:
        text = terminal.until("is still queued after 3 s")
    assert f"{job_id} queued" in text
    assert "0/4,000" in text
    assert "batchmill up -m echo" in text
    assert (BAR in text) == has_bar
    assert bool(COLOR.search(text)) == has_bar


def test_ctrl_c_gives_the_terminal_back_and_no_color_is_kept(job_id: str) -> None:
    with wait(job_id, NO_COLOR="1") as terminal:
        terminal.until("batchmill up -m echo")
        assert terminal.interrupt() == 130
    goes_on = (
        f"job {job_id} keeps running; `batchmill wait {job_id}` waits again, `batchmill cancel {job_id}` cancels it"
    )
    assert goes_on in terminal.shown
    assert "batchmill: interrupted" in terminal.shown
    assert terminal.shown.rindex("\x1b[?25h") > terminal.shown.rindex("\x1b[?25l"), "the cursor is seen again"
    assert not COLOR.search(terminal.shown), "no color"
