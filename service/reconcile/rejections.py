"""How many refused commands may be recorded: a flood of bad requests must not fill the disk."""

BURST = 100  # recorded at once
PER_S = 1.0  # recorded in the long run: 86,400 a day, some 40 MB


class Allowance:
    """A token bucket that counts what it refused, for the next event that is recorded. Time is passed in."""

    def __init__(self, burst: int = BURST, per_s: float = PER_S) -> None:
        self._burst, self._per_s = burst, per_s
        self._tokens, self._at = float(burst), 0.0
        self._suppressed = 0

    def take(self, now_s: float) -> tuple[bool, int]:
        """Whether one more may be recorded, and how many were not since the last that was."""
        if self._at:
            self._tokens = min(float(self._burst), self._tokens + (now_s - self._at) * self._per_s)
        self._at = now_s
        if self._tokens < 1.0:
            self._suppressed += 1
            return False, 0
        self._tokens -= 1.0
        suppressed, self._suppressed = self._suppressed, 0
        return True, suppressed
