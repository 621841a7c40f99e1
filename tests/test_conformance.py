"""Every decorated family of the installed transformers gives the plain model's greedy tokens.

The families are found, not listed.
"""

import pytest

import families_table
import tiny
from conformance import outcome
from retinue.errors import Unsupported
from retinue.model.architecture import model_class

# Decorated, but no class of theirs names the next token of a text.
NOT_CAUSAL = {"diffusion_gemma", "openai_privacy_filter"}
NAMES = [name for names in tiny.families().values() for name in names]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_transformers(name: str) -> None:
    assert not outcome(name).failure


def test_every_decorated_family_is_tried_or_refused_by_name() -> None:
    families = tiny.families()
    assert len(families) >= 64
    assert {family for family, names in families.items() if not names} == NOT_CAUSAL


@pytest.mark.parametrize("family", sorted(NOT_CAUSAL))
def test_a_family_that_continues_no_text_is_refused(family: str) -> None:
    with pytest.raises(Unsupported, match=f"`{family}` has no class that continues") as caught:
        model_class(tiny.config_of(family))
    assert caught.value.hint
    assert caught.value.exit_code == 3


def test_the_page_of_families_is_what_the_run_found() -> None:
    written = families_table.PAGE.read_text(encoding="utf-8")
    assert written == families_table.page(), "run `python -m tests.families_table`"
