"""Every decorated family of the installed transformers gives the plain model's greedy tokens.

The families are found, not listed. What does not work stands in KNOWN_FAILURES with its reason, so
that a family that breaks shows, and one that is mended too.
"""

import pytest

import families_table
import tiny
from conformance import outcome
from retinue.errors import Unsupported
from retinue.model.architecture import model_class

# Configuration -> the beginning of the reason.
KNOWN_FAILURES = {
    "inkling_mm_model": "no tiny `inkling_mm_model` can be built: No module named 'scipy'",
}
# Decorated, but no class of theirs names the next token of a text.
NOT_CAUSAL = {"diffusion_gemma", "openai_privacy_filter"}
NAMES = [name for names in tiny.families().values() for name in names]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_transformers(name: str) -> None:
    failure = outcome(name).failure
    if name in KNOWN_FAILURES:
        assert failure.startswith(KNOWN_FAILURES[name]), f"`{name}` works, or fails otherwise"
    else:
        assert not failure


def test_every_decorated_family_is_tried_or_refused_by_name() -> None:
    families = tiny.families()
    assert len(families) >= 64
    assert {family for family, names in families.items() if not names} == NOT_CAUSAL
    assert set(NAMES) >= KNOWN_FAILURES.keys()


@pytest.mark.parametrize("family", sorted(NOT_CAUSAL))
def test_a_family_that_continues_no_text_is_refused(family: str) -> None:
    with pytest.raises(Unsupported, match=f"`{family}` has no class that continues") as caught:
        model_class(tiny.config_of(family))
    assert caught.value.hint
    assert caught.value.exit_code == 3


def test_the_page_of_families_is_what_the_run_found() -> None:
    written = families_table.PAGE.read_text(encoding="utf-8")
    assert written == families_table.page(), "run `python -m tests.families_table`"
