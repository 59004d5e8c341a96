"""Text, its split, reproducible batches, and the learning-rate schedule."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moecluster.errors import DataError, UserError
from moecluster.models.tokenizer.byte_level import END_ID, build_byte_tokenizer
from moecluster.training.corpus import STDLIB, Domain, read_domains
from moecluster.training.data import TextData
from moecluster.training.schedule import WarmupCosine


def make_data(domains: tuple[Domain, ...], *, sequence_length: int = 8, seed: int = 0) -> TextData:
    return TextData(domains, build_byte_tokenizer(), sequence_length=sequence_length, seed=seed)


def domain(name: str, train: str, validation: str) -> Domain:
    return Domain(name=name, train=(train,), validation=(validation,))


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_a_file_is_cut_at_a_line(tmp_path):
    lines = [f"line number {i}\n" for i in range(200)]
    (found,) = read_domains(str(write_files(tmp_path, {"a.txt": "".join(lines).encode()}) / "a.txt"))
    assert "".join((*found.train, *found.validation)) == "".join(lines)
    assert found.train[0].endswith("\n")
    assert 0.05 <= len(found.validation[0]) / len("".join(lines)) <= 0.1


def test_a_directory_is_split_by_file(tmp_path):
    files = {f"sub/{i}.txt": f"document {i} {'x' * 50}".encode() for i in range(40)}
    write_files(tmp_path, files | {".git/secret": b"hidden", "image.png": b"\x89PNG\0\0", "latin.txt": b"\xff\xfe"})
    (found,) = read_domains(str(tmp_path))
    assert sorted((*found.train, *found.validation)) == sorted(content.decode() for content in files.values())
    assert 2 <= len(found.validation) <= 6
    assert read_domains(str(tmp_path)) == (found,)  # the same at every call


def test_files_that_are_all_too_long_are_cut(tmp_path):
    write_files(tmp_path, {"a": b"a\n" * 500, "b": b"b\n" * 700})
    (found,) = read_domains(str(tmp_path))
    assert sorted(found.train) == ["a\n" * 500, "b\n" * 631]
    assert found.validation == ("b\n" * 69,)


@pytest.mark.parametrize(
    ("files", "data", "message"),
    [
        ({}, "missing.txt", "no such text"),
        ({"a.txt": b""}, "a.txt", "holds no text"),
        ({"a.txt": b" \n\n "}, "a.txt", "holds no text"),
        ({"a.bin": b"\0\1\2"}, "a.bin", "binary"),
        ({"a.txt": b"caf\xe9"}, "a.txt", "is not UTF-8"),
        ({"d/a.bin": b"\0"}, "d", r"100\.0% of the bytes: 1 binary .*\(a\.bin\)"),
        ({"d/.a": b"text", "d/b": b" "}, "d", r"holds no text.*1 hidden \(\.a\); 1 empty \(b\)"),
    ],
)
def test_text_that_cannot_be_used_is_named_in_one_line(tmp_path, files, data, message):
    write_files(tmp_path, files)
    with pytest.raises(DataError, match=message) as caught:
        read_domains(str(tmp_path / data))
    assert "\n" not in str(caught.value) and data in str(caught.value)


def test_what_is_left_out_of_a_directory_is_said_with_the_reason(tmp_path):
    texts = {f"t{i}": b"plain text\n" * 100 for i in range(9)}
    others = {"l.txt": b"K\xe4se\n", "u.txt": "wide".encode("utf-16"), "e.txt": b"\n", ".git/x": b"", "sub/.h": b"a"}
    write_files(tmp_path, texts | others)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "sub", target_is_directory=True)
    (tmp_path / "nowhere").symlink_to(tmp_path / "no such")
    (found,) = read_domains(str(tmp_path))
    kinds = ("1 not UTF-8 (l.txt)", "(u.txt)", "1 empty (e.txt)", "2 hidden (.git, sub/.h)", "(elsewhere, nowhere)")
    assert all(kind in found.left_out for kind in kinds), found.left_out
    assert "0.2% of the bytes" in found.left_out and "\n" not in found.left_out
    assert make_data((found,)).left_out == (found.left_out,)
    write_files(tmp_path, {"b.txt": b"\xe4" * 2000})
    with pytest.raises(DataError, match=r"16\.\d% of the bytes: .*2 not UTF-8 \(b\.txt, l\.txt\).*max_skipped_share"):
        read_domains(str(tmp_path))
    (allowed,) = read_domains(str(tmp_path), max_skipped_share=0.5)
    assert (allowed.train, allowed.validation) == (found.train, found.validation)


def test_a_directory_of_which_nothing_is_left_out_says_nothing(tmp_path):
    (found,) = read_domains(str(write_files(tmp_path, {"a.weird": b"text", "b": b"more text"})))
    assert found.left_out == "" and make_data((domain("a", "x" * 99, "y" * 9),)).left_out == ()


def test_text_shorter_than_a_sequence():
    with pytest.raises(DataError, match=r"3 tokens of validation text.*sequence_length = 8"):
        make_data((domain("a", "x" * 100, "abc"),))


def test_three_domains_are_on_every_machine():
    found = read_domains(STDLIB)
    assert [d.name for d in found] == ["python", "prose", "c++"]
    for d in found:
        train, validation = sum(map(len, d.train)), sum(map(len, d.validation))
        assert train > 200_000 and 0.05 < validation / train < 0.2
        assert not set(d.train) & set(d.validation)
    assert "#include" in found[2].train[0] + found[2].train[1]


@given(st.integers(0, 1000), st.integers(1, 8), st.integers(0, 3))
def test_any_position_can_be_drawn_again(position, batch_size, seed):
    text = "".join(chr(97 + i % 26) for i in range(300))
    data = make_data((domain("a", text, text), domain("b", text.upper(), text)), seed=seed)
    batch = data.train_batch(position, batch_size)
    assert batch.shape == (batch_size, 8) and batch.dtype == torch.int64
    singles = [data.train_batch(position + i, 1)[0] for i in range(batch_size)]
    assert torch.equal(batch, torch.stack(singles))
    for i, ids in enumerate(batch):
        drawn = bytes(ids.tolist()).decode()
        assert drawn in (text if (position + i) % 2 == 0 else text.upper())  # domains alternate


def test_another_seed_draws_otherwise():
    text = "".join(chr(97 + i * i % 26) for i in range(300))
    one, other = (make_data((domain("a", text, text),), seed=seed).train_batch(0, 8) for seed in (0, 1))
    assert not torch.equal(one, other)


def test_documents_are_parted_by_the_end_mark():
    data = make_data((Domain(name="a", train=("abcdefgh", "ijkl"), validation=("x" * 10,)),))
    assert data.domains[0].train.tolist() == [*b"abcdefgh", END_ID, *b"ijkl"]


def test_long_texts_are_tokenized_piece_by_piece_and_whole():
    text = "naïve 漢字 😀 " * 3000
    data = make_data((domain("a", text, text),))
    assert data.domains[0].train.tolist() == list(text.encode())


def test_validation_windows_are_spread_and_in_turns():
    data = make_data((domain("a", "a" * 20, "a" * 40), domain("b", "b" * 20, "b" * 40)))
    windows = data.validation_windows(6)
    assert [chr(int(window[0])) for window in windows] == list("ababab")
    assert len(data.validation_windows(100, "b")) == 5  # no more than fit without overlap
    digits = make_data((domain("d", "0" * 20, "".join(map(str, range(10))) * 4),))
    assert bytes(digits.validation_windows(2).flatten().tolist()) == b"0123456723456789"


def test_unigram_entropy():
    assert make_data((domain("a", "a" * 20, "ab" * 8),)).unigram_bits_per_byte == pytest.approx(1.0)
    assert make_data((domain("a", "a" * 20, "a" * 16),)).unigram_bits_per_byte == 0.0
    # Domains have equal weight, however long their texts are.
    both = make_data((domain("a", "a" * 20, "a" * 16), domain("b", "b" * 20, "b" * 1000)))
    assert both.unigram_bits_per_byte == pytest.approx(1.0)
    values = np.random.default_rng(0).integers(97, 123, size=4000)
    random_text = bytes(values.tolist()).decode()
    assert make_data((domain("r", random_text, random_text),)).unigram_bits_per_byte == pytest.approx(
        math.log2(26), abs=0.01
    )


def test_learning_rate():
    schedule = WarmupCosine(lr=1.0, steps=110, warmup_steps=10, min_lr_ratio=0.1)
    assert [schedule.at(step) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert schedule.at(60) == pytest.approx(0.55)  # half-way between 1 and 0.1
    assert schedule.at(110) == pytest.approx(0.1)
    rates = [schedule.at(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
    assert WarmupCosine(lr=1.0, steps=5, warmup_steps=0, min_lr_ratio=1.0).at(1) == 1.0


def test_errors_are_the_users():
    assert issubclass(DataError, UserError)
