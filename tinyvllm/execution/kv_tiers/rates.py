"""Whether a copy is faster than computing, from measured rates."""

from __future__ import annotations

from tinyvllm.scheduling.tiers import DISK, HOST

WEIGHT = 0.25  # of the newest measurement
# Costs besides bytes: a step's transfers from host memory, and passing a request to the disk's threads and back
OVERHEAD_S = {HOST: 0.2e-3, DISK: 1e-3}
PROBE = 16  # one in so many look-ups that do not pay is copied nevertheless, because rates change
# Of the time to compute: a copy that takes longer gains little, and slows down others that use memory and disk. On an
# H200 copies from disk that were predicted to take 0.9 of it made prompts of an 8B model slower (236 to 283 ms)
WORTHWHILE = 0.7
MIN_TOKENS = 32  # a step with fewer says little about the rate of computing


class Rates:
    """Moving averages: tokens computed a second, and bytes copied a second from host memory and from disk. What has not
    been measured yet counts as fast for copies and slow for computing."""

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None
        self.bytes_per_s: dict[int, float | None] = {HOST: None, DISK: None}
        self._num_declined = 0

    def pays(self, num_tokens: int, num_bytes: int, depth: int) -> bool:
        """Whether copying `num_bytes` from host memory, or from disk through host memory, clearly beats computing."""
        if self.tokens_per_s is None:
            return True
        rates = [self.bytes_per_s[level] for level in (HOST, DISK)[:depth]]
        copy_s = OVERHEAD_S[depth] + sum(num_bytes / rate for rate in rates if rate is not None)
        if copy_s < WORTHWHILE * num_tokens / self.tokens_per_s:
            return True
        self._num_declined += 1
        return self._num_declined % PROBE == 0

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        if num_tokens >= MIN_TOKENS and seconds > 0:
            self.tokens_per_s = _average(self.tokens_per_s, num_tokens / seconds)

    def note_loaded(self, num_bytes: int, seconds: float) -> None:
        """From host memory to the device."""
        if num_bytes and seconds > 0:
            self.bytes_per_s[HOST] = _average(self.bytes_per_s[HOST], num_bytes / seconds)

    def note_read(self, num_bytes: int, seconds: float) -> None:
        """From disk to host memory."""
        if num_bytes and seconds > 0:
            self.bytes_per_s[DISK] = _average(self.bytes_per_s[DISK], num_bytes / seconds)


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)
