"""A caption."""

import unicodedata

MAX_BYTES = 2**14


def caption(data: bytes) -> str:
    """The text of a caption's file, in UTF-8, of one or several lines.

    Raises:
        ValueError: if it is too long or holds what is no text.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"a caption of {len(data):,} bytes; at most {MAX_BYTES:,} are read")
    text = data.decode().strip()
    if any(unicodedata.category(character) == "Cc" and character not in "\n\r\t" for character in text):
        raise ValueError("a caption with control characters")
    return text
