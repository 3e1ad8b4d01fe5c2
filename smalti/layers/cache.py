"""Keys and values of earlier tokens, so that each is computed once."""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Keys and values of one layer, (r, heads, length, d / heads) each, allocated once, at the first `write`.

    It is written by position: tokens that are taken back (drafts that were refused) are overwritten by what follows.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def write(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Set positions start…start + m − 1 to (r, heads, m, d / heads); returns views of all up to there."""
        if self.keys is None or self.values is None:
            self.keys, self.values = (x.new_empty(*x.shape[:2], self.length, x.shape[3]) for x in (keys, values))
        m = keys.shape[2]
        self.keys.narrow(2, start, m).copy_(keys)
        self.values.narrow(2, start, m).copy_(values)
        return self.keys.narrow(2, 0, start + m), self.values.narrow(2, 0, start + m)

    def keep(self, rows: int) -> None:
        """Forget all rows but the first ones."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:rows], self.values[:rows]
