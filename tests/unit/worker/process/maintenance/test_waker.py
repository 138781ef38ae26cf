"""Wake-ups are sent beside whoever asks for them."""

from __future__ import annotations

import threading

from batchmill.jobs.errors import StoreUnavailable
from batchmill.worker.process.maintenance.waker import Waker


def test_who_asks_does_not_wait_and_many_requests_are_few_sendings() -> None:
    hold, sent = threading.Event(), []

    def send() -> None:
        sent.append(1)
        hold.wait(10)

    waker = Waker(send)
    waker.start()
    for _ in range(50):
        waker.wake()
    waker.wait(seconds=0.05)  # Redis hangs: so long, and no longer
    hold.set()
    waker.wait(seconds=10)
    assert 1 <= len(sent) <= 2


def test_a_store_that_is_away_does_not_end_it() -> None:
    answers = iter([StoreUnavailable("away"), None])
    sent = threading.Event()

    def send() -> None:
        answer = next(answers)
        if answer is not None:
            raise answer
        sent.set()

    waker = Waker(send)
    waker.start()
    waker.wake()
    waker.wait(seconds=10)
    waker.wake()
    assert sent.wait(10)
