"""Whether looking ahead pays here: measured, by doing without it now and then.

What forecasts cost (asking for them, reads that nobody needs, demands that wait behind them) and
what they save depends on the disk, the memory and the text. So it is not modelled: of some decoding
passes half run without, and whoever had the shorter median does the passes that follow, for longer
as long as that is confirmed. It knows seconds alone, so that the same seconds give the same answer.
"""

from statistics import median

FIRST = 16  # passes with forecasts before the first trial, in which the cache fills
TRIAL, APART, WITHOUT = 48, 4, 2  # passes of a trial; of each so many, how many go without
KEEP, MOST = 256, 2048  # passes until the next trial, and at most
MARGIN = 0.98  # of the time with forecasts: without has to be clearly quicker, or it is chance


class Payback:
    """Says before each decoding pass whether it looks ahead, and hears how long it took."""

    def __init__(self) -> None:
        self.pays = True  # as far as is known
        self.ahead = True  # whether the pass that runs looks ahead
        self._left, self._tries = FIRST, False  # passes of this kind, and whether it is a trial
        self._keep = KEEP
        self._times: dict[bool, list[float]] = {True: [], False: []}

    def begin(self) -> None:
        """A decoding pass starts."""
        if not self._left:
            self._turn()
        self._left -= 1
        self.ahead = self.pays if not self._tries else self._left % APART >= WITHOUT

    def end(self, seconds: float) -> None:
        """That pass took so long."""
        if self._tries:
            self._times[self.ahead].append(seconds)

    def _turn(self) -> None:
        """A trial begins, or has ended."""
        if self._tries:
            before, times = self.pays, self._times
            if times[True] and times[False]:
                self.pays = median(times[False]) >= MARGIN * median(times[True])
            self._keep = min(2 * self._keep, MOST) if self.pays == before else KEEP
            self._times = {True: [], False: []}
        self._tries = not self._tries
        self._left = TRIAL if self._tries else self._keep
