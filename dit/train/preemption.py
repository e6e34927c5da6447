"""Signals that ask a run to stop."""

import signal
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}  # 75: start me again


class Preemption:
    """Within a `with`, notes SIGINT and SIGTERM, for the run to finish its step, save and leave; a second one kills.

    Attributes:
        exit_code: of the signal that came; None while none has.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None

    def __enter__(self) -> "Preemption":
        self._previous = {signum: signal.getsignal(signum) for signum in EXIT_CODES}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def install(self) -> None:
        """Take over the signals, from whoever has them now."""
        for signum in EXIT_CODES:
            signal.signal(signum, self._note)

    def leave_at_once(self) -> None:
        """From now on a signal ends the process where it is, as there is nothing left to save."""
        for signum in EXIT_CODES:
            signal.signal(signum, self._leave)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.exit_code = EXIT_CODES[signal.Signals(signum)]
        signal.signal(signum, signal.SIG_DFL)
        print("\ndit: stopping after this step; once more to stop at once", flush=True)

    def _leave(self, signum: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_CODES[signal.Signals(signum)])
