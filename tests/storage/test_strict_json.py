"""What is refused in JSON and its files, before any value is used."""

import os
import tracemalloc
from pathlib import Path

import pytest

from tinyvllm.errors import ModelError
from tinyvllm.storage.regular_file import check_inside, file_inside, read_regular
from tinyvllm.storage.strict_json import MAX_DEPTH, parse_json, read_json, read_json_if_present
from tinyvllm.storage.values import Values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1e400]", "1e400 is beyond the range of a float"),
        (b"1" * 5000, "limit"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' is stated twice, with different values"),
        (b'["\\ud800"]', "half of a surrogate pair"),
        (b'{"\\uDFFF\\uD800": 1}', "half of a surrogate pair"),
        (b'["\xed\xa0\x80"]', "not UTF-8 at byte 2"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"nested more than {MAX_DEPTH} deep"),
        (b'{"a":' * 100_000, f"nested more than {MAX_DEPTH} deep"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_nothing_can_use_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=f"cannot read x: .*{message}"):
        parse_json(text, "x")


def test_json_that_real_files_have_is_read() -> None:
    assert parse_json(b'{"a": [0.0, Infinity], "a": [0.0, Infinity]}', "x") == {"a": [0.0, float("inf")]}
    assert parse_json(b"1000000000000000019884624838656", "x") == int(1e30)
    assert parse_json(b'"\\ud83d\\ude00"', "x") == "😀"
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, "x")
    with pytest.raises(ModelError, match="'a' is stated twice"):
        parse_json(b'{"a": 1, "a": 1}', "x", allows_repeats=False)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "folder").mkdir()
    kinds = {
        "pipe": "a pipe",
        "zero": "a device",
        "folder": "a directory",
        "circle": "symbolic links",
        "x" * 300: "long",
    }
    for name, kind in kinds.items():
        with pytest.raises(ModelError, match=f"cannot read .*{kind}"):
            read_json(tmp_path / name)
    with pytest.raises(ModelError, match="a pipe"):
        read_json_if_present(tmp_path / "pipe")
    assert read_json_if_present(tmp_path / "absent.json") == {}
    (tmp_path / "large.json").write_bytes(b"x" * 11)
    with pytest.raises(ModelError, match="has 11 bytes, but a file of its kind must have at most 10"):
        read_regular(tmp_path / "large.json", 10)


def test_names_in_files_stay_in_the_models_directory(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "inside").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(b"")
    (model / "link").symlink_to("../outside")
    (model / "kept").symlink_to("inside")
    assert file_inside(model, "inside/a", model / "index") == model / "inside/a"
    assert file_inside(model, "kept/a", model / "index") == model / "kept/a"
    for name in ("../outside", "inside/../../outside", "/etc/passwd", "", "a\0b", "..\\outside"):
        with pytest.raises(ModelError, match=r"names .*, but must name files in"):
            file_inside(model, name, model / "index")
    with pytest.raises(ModelError, match=r"is a link to .*outside, which is outside the model's directory"):
        file_inside(model, "link", model / "index")


def test_only_the_hubs_own_links_lead_out_of_a_directory(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--m"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for folder in ("blobs", "others"):
        (repository / folder).mkdir()
        (repository / folder / "4567").write_bytes(b"")
        (snapshot / folder).symlink_to(f"../../{folder}/4567")
    check_inside(snapshot, snapshot / "blobs")
    with pytest.raises(ModelError, match="outside the model's directory"):
        check_inside(snapshot, snapshot / "others")


@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan"), 1e39, -1.0, True, "1", [], {}])
def test_a_number_is_what_float32_holds(value: object) -> None:
    values = Values(Path("config.json"), {"a": value})
    with pytest.raises(ModelError, match=r"config\.json: a is .*: it must be a number that is not negative"):
        values.optional_number("a")


@pytest.mark.parametrize("value", [-1, 1.0, 32000, 10**400, True, "1", [1], {}])
def test_an_id_is_one_of_the_vocabulary(value: object) -> None:
    values = Values(Path("config.json"), {"a": value})
    with pytest.raises(ModelError, match=r"a is .*: it must be a token id below the size of the vocabulary"):
        values.token_id("a", vocab_size=32000)


def test_messages_about_huge_values_are_short() -> None:
    values = Values(Path("config.json"), {"a": ["x" * 10_000] * 10_000, "b": 10**5000, "c": {"d": "x" * 10_000}})
    for key in values.values:
        with pytest.raises(ModelError) as caught:
            values.integer(key)
        assert len(str(caught.value)) < 500
    with pytest.raises(ModelError, match=r"config.json: c\.d is 'xxx"):
        (values.inner("c") or values).integer("d")


def test_reading_allocates_what_the_file_has(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_bytes(b"{}")
    tracemalloc.start()
    try:
        read_json(tmp_path / "small.json", at_most=1 << 28)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
