"""Sets logging up: one line for people on a terminal, JSON for programs, both on standard error.

What is logged is decided where it is logged. Call `configure` before anything imports structlog.
"""

import logging
import sys
from typing import Any

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(level: str, form: str) -> None:
    """Log from this level on, as "text", "json" or "auto" (text on a terminal)."""
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    if not text and "structlog" not in sys.modules:
        _import_without_rich()
    import structlog

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if text:
        renderer: list[Any] = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)]
    elif form == "auto":
        renderer = [structlog.processors.format_exc_info, structlog.processors.LogfmtRenderer(key_order=_ORDER)]
    else:
        renderer = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # What libraries have to say goes the same way, from warnings on.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


def _import_without_rich() -> None:
    """Import structlog as if rich were not there, which only its tracebacks on a terminal want: that halves the time.

    With None for a module, importing it raises ModuleNotFoundError (the import system, section 5.3.1).
    """
    already = sys.modules.get("rich")
    sys.modules["rich"] = None  # type: ignore[assignment]
    import structlog  # noqa: F401

    if already is None:
        del sys.modules["rich"]
    else:
        sys.modules["rich"] = already


_ORDER = ["timestamp", "level", "event"]
