"""The paper's task extraction: every task has keywords, and the most matches win.

eMoE (arXiv 2503.06823, section 4.1). Deviations: the paper's lists are not published, so ours are
the most telling words of each task's texts in the profile; it says nothing of ties and of prompts
without a keyword, which here are unknown.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

LISTED = 150  # keywords a task, at most
RARE = 3  # a word that occurs less often in a task's texts tells nothing

_WORD = re.compile(r"[^\W\d_]{2,}")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


class Keywords:
    """Counts, sentence by sentence, how many keywords of each task occur.

    words: by task, how often each of its most frequent token ids occurred. decode: ids to text.
    """

    def __init__(
        self, words: Mapping[str, Mapping[int, int]], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._decode = decode
        spoken = {task: _spoken(counts, decode) for task, counts in words.items()}
        self.lists = {task: _telling(task, spoken) for task in spoken}

    def classify(self, text: str, ids: Sequence[int]) -> str | None:
        """The task with the most matches; None where there are none, or several have as many."""
        matches: Counter[str] = Counter()
        for sentence in _SENTENCE_END.split(text or self._decode(ids)):
            said = set(_WORD.findall(sentence.lower()))
            for task, listed in self.lists.items():
                matches[task] += len(said & listed)
        (first, most), *others = [*matches.most_common(2), ("", 0)]
        return first if most > others[0][1] else None


def _spoken(counts: Mapping[int, int], decode: Callable[[Sequence[int]], str]) -> Counter[str]:
    """How often each word occurs that is a token of its own; pieces of words are left out."""
    spoken: Counter[str] = Counter()
    for token, count in counts.items():
        piece = decode([token])
        if piece[:1].isspace() and _WORD.fullmatch(word := piece.strip().lower()):
            spoken[word] += count
    return spoken


def _telling(task: str, spoken: Mapping[str, Counter[str]]) -> frozenset[str]:
    """The words of `task` that say the most: by their share of its words, above the mean share.

    Shares, so that a task with more texts has no more to say.
    """
    totals = {name: max(words.total(), 1) for name, words in spoken.items()}
    weights = {}
    for word, count in spoken[task].items():
        shares = {name: words[word] / totals[name] for name, words in spoken.items()}
        above = shares[task] * len(shares) / sum(shares.values()) - 1
        if count >= RARE and above > 0:
            weights[word] = shares[task] * above
    return frozenset(sorted(weights, key=lambda word: (-weights[word], word))[:LISTED])
