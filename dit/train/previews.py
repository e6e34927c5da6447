"""The pictures that a run has drawn while it trained."""

import re
from pathlib import Path

from dit.data.picture import opened

NAME = re.compile(r"step-([0-9]+)\.png")


def previews(folder: Path) -> dict[int, Path]:
    """Those of a run's folder by their steps, in order; a warning names those whose name does not say it."""
    found = {}
    for path in sorted(folder.glob("samples/step-*.png")):
        if match := NAME.fullmatch(path.name):
            found[int(match[1])] = path
        else:
            print(f"dit: WARNING: {path} is left out: its name does not say of which step it is", flush=True)
    return dict(sorted(found.items()))


def contents(path: Path) -> bytes | None:
    """What is in the file of a picture; None, with a warning, if it cannot be read."""
    try:
        data = path.read_bytes()
        with opened(data) as image:
            image.load()
        return data
    except Exception as error:  # Pillow raises many kinds
        print(f"dit: WARNING: {path} is left out: {' '.join(str(error).split())[:100]}", flush=True)
        return None
