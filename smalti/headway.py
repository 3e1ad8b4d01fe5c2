"""How far a long piece of work is: a line on stderr now and then."""

from __future__ import annotations

import sys
import time


class Headway:
    """Counts `what` (such as "images encoded") towards `total`; says so at most once every `every_s` seconds."""

    def __init__(self, total: int, what: str, *, say: bool = True, every_s: float = 10.0) -> None:
        self.total, self.what, self.say, self.every_s = total, what, say, every_s
        self.done = 0
        self._began = self._said = time.perf_counter()

    def add(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        now = time.perf_counter()
        if self.say and self.done and (now - self._said > self.every_s or self.done == self.total):
            self._said = now
            rate = self.done / max(now - self._began, 1e-9)
            minutes, seconds = divmod(round((self.total - self.done) / rate), 60)
            left = f"{minutes}:{seconds:02} left"
            line = f"{self.done:,} of {self.total:,} {self.what}, {rate:,.4g} a second, {left}"
            print(line, file=sys.stderr, flush=True)
