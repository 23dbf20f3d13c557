"""The few drawings that buttons wear, as SVG of one stroke."""

from __future__ import annotations

from markupsafe import Markup

_PATHS = {
    "menu": "M4 7h16M4 12h16M4 17h16",
    "plus": "M12 5v14M5 12h14",
    "more": "M5 12h.01M12 12h.01M19 12h.01",
    "search": "M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14zM20 20l-4-4",
    "theme": "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
    "keys": "M3.5 7h17v10h-17zM7 10.5h.01M10.3 10.5h.01M13.7 10.5h.01M17 10.5h.01M8 14h8",
    "settings": "M4 7h9M17 7h3M4 17h3M11 17h9M15 5v4M9 15v4",
    "copy": "M9 9h11v11H9zM5 15H4V4h11v1",
    "edit": "M4 20h4L19 9l-4-4L4 16z",
    "again": "M20 12a8 8 0 1 1-2.5-5.800M20 4v4h-4",
    "on": "M6 5l12 7-12 7z",
    "raw": "M8 7l-5 5 5 5M16 7l5 5-5 5",
    "down": "M6 9l6 6 6-6",
    "tool": "M14.5 6.5a4 4 0 0 1 5-1l-2.5 2.5v1.5h1.5L21 7a4 4 0 0 1-5.5 5L8 19.5 4.5 16 12 8.5a4 4 0 0 1 2.5-2z",
    "in": "M12 4v11M7 10l5 5 5-5M4 20h16",
    "out": "M12 15V4M7 9l5-5 5 5M4 20h16",
    "leave": "M10 4H5v16h5M15 8l4 4-4 4M19 12H9",
}


def icon(name: str) -> Markup:
    """An SVG that screen readers pass over: the button around it has the words."""
    return Markup('<svg viewBox="0 0 24 24" aria-hidden="true"><path d="{}"/></svg>').format(_PATHS[name])
