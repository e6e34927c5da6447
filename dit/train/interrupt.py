"""Signals that ask a run to stop."""

import signal
from types import FrameType


class Interrupt:
    """Notes SIGINT and SIGTERM, for the run to finish its step, save and leave; a second one ends it at once.

    Attributes:
        signum: the signal that came, or None.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None

    def install(self) -> None:
        """Take over the signals."""
        for signum in self.SIGNALS:
            signal.signal(signum, self._note)

    def release(self) -> None:
        """Let the signals end the process again."""
        for signum in self.SIGNALS:
            signal.signal(signum, signal.SIG_DFL)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)
        print("\ndit: stopping after this step; once more to stop at once", flush=True)
