"""Strings that come from files and become names of files: every one passes here."""

import re

LENGTH = 120  # characters; with suffix and numbers a name stays below the 255 bytes that file systems take
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # of Windows


def safe_name(text: str, fallback: str = "unnamed") -> str:
    """`text` as one part of a path: no separators, control characters or leading dots, never empty, not too long.
    Letters of any script stay as they are."""
    name = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*\ud800-\udfff]', "_", str(text)).strip().lstrip(".").rstrip(". ")
    while len(name.encode()) > 2 * LENGTH or len(name) > LENGTH:
        name = name[:-1]
    if not name.strip("_"):
        return fallback
    return f"_{name}" if RESERVED.fullmatch(name) else name


def safe_path(text: str, fallback: str = "unnamed") -> str:
    """Like `safe_name`, of a relative path: its folders stay, upwards it does not go."""
    parts = [safe_name(part) for part in re.split(r"[/\\]", str(text)) if part.strip() not in ("", ".", "..")]
    return "/".join(parts) or fallback
