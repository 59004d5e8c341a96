"""A batch's journal: whichever byte a crash stops it at, no line is repeated or lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecluster.errors import DataError, ResourceError
from moecluster.http_client.batch.journal import Journal, is_complete, journal_path
from moecluster.http_client.batch.lines import MAX_LINE_BYTES, BatchInput
from moecluster.http_client.batch.tally import Tally

NUM_LINES = 6


def request_line(custom_id: str, **changes: Any) -> dict[str, Any]:
    body = {"model": "m", "prompt": custom_id}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body, **changes}


def write_input(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def output_of(batch: BatchInput, index: int) -> dict[str, Any]:
    return {"custom_id": batch.line(index).custom_id, "response": {"status_code": 200, "body": f"ü\n{index}"}}


@pytest.fixture
def batch(tmp_path: Path) -> BatchInput:
    return BatchInput(write_input(tmp_path / "in.jsonl", *(request_line(f"id-{i}") for i in range(NUM_LINES))))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def finish(batch: BatchInput, out: Path) -> list[int]:
    """Processes the remaining lines; returns them."""
    with Journal(out, batch) as journal:
        left = list(journal.pending())
        for index in left:
            journal.append([(index, output_of(batch, index))])
        journal.finish()
    return left


@settings(max_examples=40)
@given(order=st.permutations(range(NUM_LINES)), data=st.data())
def test_after_a_crash_at_any_byte_each_line_is_there_once_and_what_was_noted_is_not_asked_again(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("batch")
    out = folder / "out.jsonl"
    source = write_input(folder / "in.jsonl", *(request_line(f"id-{i}") for i in range(NUM_LINES)))
    with BatchInput(source) as batch:
        ends = []
        with Journal(out, batch) as journal:
            ends.append(journal.path.stat().st_size)
            for index in order:
                journal.append([(index, output_of(batch, index))])
                ends.append(journal.path.stat().st_size)
        content = journal_path(out).read_bytes()
        for _ in range(data.draw(st.integers(1, 3), label="crashes")):
            cut = data.draw(st.integers(0, len(content)), label="bytes that the crash left")
            content = content[:cut]
            journal_path(out).write_bytes(content)
            noted = {index for index, end in zip(order, ends[1:], strict=True) if end <= cut}
            with Journal(out, batch) as journal:
                assert journal.done == len(noted) and set(journal.pending()) == set(range(NUM_LINES)) - noted
            content = journal_path(out).read_bytes()  # the torn line is cut off
        assert finish(batch, out) == sorted(set(range(NUM_LINES)) - noted)
        assert read_lines(out) == [output_of(batch, index) for index in range(NUM_LINES)]
        assert is_complete(out, batch) and not journal_path(out).exists()
        assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_crash_while_the_output_is_put_in_its_place_is_made_good(batch, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    with Journal(out, batch) as journal:
        journal.append([(i, output_of(batch, i)) for i in range(NUM_LINES)])
        kept = journal.path.read_bytes()
        (tmp_path / "out.jsonl.new").write_text("half of i")  # of a crash before the rename
        journal.finish()
    journal_path(out).write_bytes(kept)  # of a crash after it
    assert finish(batch, out) == []
    assert len(read_lines(out)) == NUM_LINES


def test_a_journal_of_another_input_is_refused_and_so_is_a_damaged_one(batch, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    with Journal(out, batch) as journal:
        journal.append([(2, output_of(batch, 2))])
    other = BatchInput(write_input(tmp_path / "other.jsonl", request_line("id-0")))
    with pytest.raises(DataError, match="belongs to another input"):
        Journal(out, other)
    good = journal_path(out).read_bytes()
    for damage in (
        b"junk\n",
        b'{"index":2,"output":{"custom_id":"id-2"}}\n',
        b'{"index":3,"output":{"custom_id":"x"}}\n',
    ):
        journal_path(out).write_bytes(good + damage)
        with pytest.raises(DataError, match="line 3 is damaged"):
            Journal(out, batch)


def test_two_processes_never_work_on_one_output(batch, tmp_path) -> None:
    with Journal(tmp_path / "out.jsonl", batch), pytest.raises(ResourceError, match="another moecluster batch"):
        Journal(tmp_path / "out.jsonl", batch)
    Journal(tmp_path / "out.jsonl", batch).close()


def test_a_disk_that_refuses_ends_the_journal_without_losing_what_is_on_it(batch, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out.jsonl"

    def full(file: int, content: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    with Journal(out, batch) as journal:
        journal.append([(0, output_of(batch, 0))])
        with (
            monkeypatch.context() as patched,
            pytest.raises(ResourceError, match=r"No space left.*1 of 6 lines are kept"),
        ):
            patched.setattr("os.pwrite", full)
            journal.append([(1, output_of(batch, 1))])
        with pytest.raises(ResourceError, match="No space left"):  # even with free space again: the end may be torn
            journal.append([(2, output_of(batch, 2))])
    assert finish(batch, out) == [1, 2, 3, 4, 5]


MALFORMED: list[tuple[dict[str, Any] | str, str]] = [
    ("{", "no JSON"),
    ("[1]", "no JSON object"),
    (request_line("", url="/v1/completions"), '"custom_id"'),
    ({**request_line("x"), "custom_id": 3}, '"custom_id"'),
    (request_line("x", method="GET"), '"method": expected "POST"'),
    (request_line("x", url="/v1/embeddings"), '"url": expected /v1/completions or'),
    (request_line("x", body=[]), '"body"'),
    (request_line("x", body={"stream": True}), "not streamed"),
    (request_line("first"), 'the custom_id "first" is in line 1 already'),
]


@pytest.mark.parametrize(("line", "complaint"), MALFORMED)
def test_a_malformed_line_is_named_by_its_number(tmp_path, line, complaint) -> None:
    path = write_input(tmp_path / "in.jsonl", request_line("first"), "", line, request_line("last"))
    with pytest.raises(DataError, match=f"line 3: .*{complaint}"):
        BatchInput(path)


def test_many_malformed_lines_are_named_up_to_a_number_and_others_are_not_sent_either(tmp_path) -> None:
    with pytest.raises(DataError, match=r"nothing was sent; line 1: .*; line 10: .*; and 20 more$"):
        BatchInput(write_input(tmp_path / "in.jsonl", *["{"] * 30, request_line("fine")))
    with pytest.raises(DataError, match="holds no line"):
        BatchInput(write_input(tmp_path / "in.jsonl", "", "  "))
    (tmp_path / "in.jsonl").write_bytes(b"x" * (MAX_LINE_BYTES + 1))
    with pytest.raises(DataError, match="line 1: longer than"):
        BatchInput(tmp_path / "in.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        BatchInput(tmp_path / "nowhere.jsonl")


def test_lines_are_read_as_they_stand_and_a_file_that_changes_is_noticed(tmp_path) -> None:
    path = write_input(tmp_path / "in.jsonl", "", request_line("a"), " " * 20_000, request_line("ü" * 500))
    with BatchInput(path) as batch:
        assert len(batch) == 2
        assert batch.line(0).body == {"model": "m", "prompt": "a"}
        assert (batch.line(1).number, batch.line(1).custom_id) == (4, "ü" * 500)
        path.write_text("x" * 1000)
        with pytest.raises(DataError, match="changed while it was worked on; line 2"):
            batch.line(0)


def test_a_file_is_complete_only_with_every_line_in_order(batch, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    assert not is_complete(out, batch)
    lines = [json.dumps(output_of(batch, i)) for i in range(NUM_LINES)]
    for kept, complete in ((lines, True), (lines[:-1], False), (lines[::-1], False), ([*lines, lines[0]], False)):
        out.write_text("\n".join(kept) + "\n")
        assert is_complete(out, batch) is complete


def test_the_tally_counts_by_kind() -> None:
    tally = Tally()
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    for output in (
        {"response": {"status_code": 200, "body": {"usage": usage}}},
        {"response": {"status_code": 200, "body": "?"}},
        {"response": {"status_code": 400, "body": {"usage": usage}}},
        {"response": None, "error": {"code": "timeout"}},
        {"response": None, "error": None},
    ):
        tally.add(output)
    assert (tally.done, tally.answered, tally.prompt_tokens, tally.completion_tokens) == (5, 2, 3, 4)
    assert dict(tally.failed) == {"status 400": 1, "timeout": 1, "unknown": 1}
