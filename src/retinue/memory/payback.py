"""Whether looking ahead pays here: measured, by doing without it now and then, or by waiting.

What forecasts cost (asking for them, reads that nobody needs, demands that wait behind them) and
what they save depends on the disk, the memory and the text. So it is not modelled: now and then
some decoding passes do otherwise, and whoever had the shorter median does the passes that follow,
for longer as long as that is confirmed. It knows seconds alone, so that the same seconds give the
same answer. A trial that clearly confirms what was known ends early, since half of it is slow.

Prompts are few, and of all lengths, so they are not compared with each other. They show it
themselves: a layer of a prompt mostly has enough to compute while it reads what it lacks, and then
the next one will not wait either, forecast or not. So a layer looks ahead once it has waited for as
long as a look takes. That is the rule of who may rent or buy without knowing for how long: it
costs at most twice what the better of both would have.
"""

from statistics import median

FIRST = 16  # passes with forecasts before the first trial, in which the cache fills
TRIAL, APART = 48, 4  # passes of a trial; of each so many, how many do otherwise
WITHOUT, WITH = 2, 1  # while it pays, and while it does not
KEEP, MOST = 256, 2048  # passes until the next trial, and at most
CLEAR, ENOUGH = 0.9, 6  # of all pairs that were as expected, of so many passes of either kind
LATELY = 0.25  # what the last look counts in how long looks take
MARGIN = 0.98  # of the time so far: who does otherwise has to be clearly quicker, or it is chance


class Payback:
    """Says before each decoding pass whether it looks ahead, and hears how long it took."""

    def __init__(self) -> None:
        self.pays = True  # as far as is known
        self.ahead = True  # whether the pass that runs looks ahead
        self._begun = False
        self._left, self._tries = FIRST, False  # passes of this kind, and whether it is a trial
        self._keep = KEEP
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._expected = 0  # pairs of the trial's passes of which the usual one was quicker

    def begin(self, *, waits: bool = True) -> None:
        """A decoding pass starts. `waits` is what prompts say until something was tried."""
        if not self._begun and not waits:
            self.pays, self._left = False, 0
        self._begun = True
        if not self._left:
            self._turn()
        self._left -= 1
        otherwise = self._tries and self._left % APART < (WITHOUT if self.pays else WITH)
        self.ahead = self.pays != otherwise

    def end(self, seconds: float) -> None:
        """That pass took so long."""
        if not self._tries:
            return
        self._times[self.ahead].append(seconds)
        others = self._times[not self.ahead]
        quicker = sum(seconds < other for other in others)
        self._expected += quicker if self.ahead == self.pays else len(others) - quicker
        pairs = len(others) * len(self._times[self.ahead])
        if pairs >= ENOUGH * ENOUGH and self._expected >= CLEAR * pairs:
            self._left = 0

    def _turn(self) -> None:
        """A trial begins, or has ended."""
        if self._tries:
            before, times = self.pays, self._times
            if times[True] and times[False]:
                quicker = median(times[not before]) < MARGIN * median(times[before])
                self.pays = before != quicker
            self._keep = min(2 * self._keep, MOST) if self.pays == before else KEEP
            self._times, self._expected = {True: [], False: []}, 0
        self._tries = not self._tries
        self._left = TRIAL if self._tries else self._keep


class Patience:
    """How long a layer of a prompt that lacks experts waits before it looks ahead."""

    def __init__(self) -> None:
        self.takes_s = 0.0  # a look, lately; unknown at first, so that the first wait tells
        # Whether the last such layer waited that long: what those go by that lack nothing.
        self.pays = True

    def looked(self, seconds: float) -> None:
        """A layer waited long enough, and its look took so long."""
        self.pays = True
        self.takes_s += (LATELY if self.takes_s else 1.0) * (seconds - self.takes_s)
