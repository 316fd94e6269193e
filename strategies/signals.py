"""Hold signals back while weights are not what they should be.

Lightning's SLURM handler saves a checkpoint from inside the signal handler, which Python runs
between any two lines. Blocking signals in this thread is not enough: another thread may take the
signal, and Python still runs the handler here. So the handlers themselves are exchanged.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Record signals that have a Python handler; raise them again on leaving, in order of arrival.

    Signals with the default action keep it: one that ends the process saves nothing. Outside the
    main thread this does nothing, since Python runs handlers in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def record(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    handlers = {s: signal.getsignal(s) for s in signal.valid_signals() if callable(signal.getsignal(s))}
    for number in handlers:
        signal.signal(number, record)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)
