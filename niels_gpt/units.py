"""Numbers with their units, for people."""


def duration(seconds: float) -> str:
    """Format seconds, to about two significant digits."""
    if seconds < 9.5:
        return f"{seconds:.2g} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def clock(seconds: float) -> str:
    """Format seconds to the second, as 1:02:03 or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def size(n: int) -> str:
    """Format a number of bytes in decimal units."""
    if n < 1000:
        return f"{n} byte" + "s" * (n != 1)
    value, units = n / 1000, ["kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
