"""A metric of a set of images and a reference, by what an extractor sees in both."""

from collections.abc import Callable
from typing import Any, NamedTuple

from dit.metric.extractor import Extractor
from dit.metric.seen import Seen


class Distribution(NamedTuple):
    """Metrics with the same extractor look at images once, together."""

    extractor: Callable[[], Extractor]
    figure: Callable[[Seen, Seen], float | dict[str, float]]

    @property
    def moments(self) -> tuple[str, ...]:
        """Layers of which the figure reads the moments."""
        return getattr(_plain(self.figure), "moments", ())

    @property
    def rows(self) -> tuple[str, ...]:
        """Layers whose rows it reads."""
        return getattr(_plain(self.figure), "rows", ())

    @property
    def reference_rows(self) -> tuple[str, ...]:
        """Those of the reference that it reads."""
        found: tuple[str, ...] = getattr(_plain(self.figure), "reference_rows", self.rows)
        return found

    def check(self, num_images: int) -> None:
        """See beforehand whether so many samples will do.

        Raises:
            ValueError: if not.
        """
        check = getattr(_plain(self.figure), "check", None)
        if check:
            check(num_images, **getattr(self.figure, "keywords", {}))


def _plain(function: Any) -> Any:
    """A function without the arguments that were set."""
    return getattr(function, "func", function)
