"""docs/compatibility.md says what the tests say."""

from tests.compatibility import PAGE, page_of_the_tests


def test_page_is_as_the_tests_have_it_when_read():
    assert PAGE.read_text() == page_of_the_tests(), "run: python -m tests.compatibility"
