from hypothesis import given
from hypothesis import strategies as st

from moecluster.router.engine.stop_strings import StopStrings

LETTERS = st.text(alphabet="ab", max_size=12)


@given(chunks=st.lists(LETTERS, max_size=8), stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_a_request_ends_before_the_first_stop_string_however_it_is_cut(chunks, stops) -> None:
    whole = "".join(chunks)
    found = [at for stop in stops if (at := whole.find(stop)) >= 0]
    seen, stopped, texts = "", False, StopStrings(stops)
    for chunk in chunks:
        certain, stopped = texts.push(chunk)
        seen += certain
        assert not any(stop in seen for stop in stops)
        if stopped:
            break
    if not stopped:
        seen += texts.finish()
    assert stopped == bool(found)
    if not found:
        assert seen == whole
    else:  # the stop string completed first ends the text, even if another one began before it
        assert whole.startswith(seen) and any(whole[len(seen) :].startswith(stop) for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    texts = StopStrings(["END"])
    assert texts.push("the E") == ("the ", False)
    assert texts.push("N") == ("", False)
    assert texts.push("X") == ("ENX", False)
    assert texts.push("END and more") == ("", True)
