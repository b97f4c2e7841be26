"""The two streams of the terminal, one console each: what is printed on one does not tear a live display on it.

Progress, warnings and errors go to stderr; the summary and the final table to stdout.
"""

from __future__ import annotations

from rich.console import Console

OUT = Console(highlight=False, soft_wrap=False)
ERR = Console(stderr=True, highlight=False)
