"""A run that is asked to stop: by a time limit or pre-emption (SIGTERM, SIGUSR1) or at the keyboard (SIGINT)."""

import contextlib
import signal
from collections.abc import Iterator

EXIT_CODE = 75  # EX_TEMPFAIL: what was done is kept, the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopping:
    """`asked` is the name of the signal once one came. The handler does nothing else: SLURM sends several in a row, and
    whatever prints or saves inside a handler can meet itself."""

    asked: str | None = None

    def _note(self, number: int, _frame) -> None:
        self.asked = signal.Signals(number).name

    @contextlib.contextmanager
    def heard(self) -> Iterator["Stopping"]:
        """Signals are noted while this lasts; before and after it they end the process, which has nothing to save."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
