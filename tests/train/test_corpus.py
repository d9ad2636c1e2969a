"""Which bytes are trained, validated and tested on."""

import gzip
import hashlib
import io
import itertools
import re
import sysconfig
import zipfile
from pathlib import Path

import pytest

from fastmoe.train import corpus
from fastmoe.train.corpus import load_corpus


def parts(loaded):
    return [bytes(part.tolist()) for part in (loaded.train, loaded.valid, loaded.test)]


def write(path, content):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content, 1))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(path.stem, content)
    else:
        path.write_bytes(content)
    return path


def spoiled_zip(compression=zipfile.ZIP_DEFLATED, flags=0, method=None, byte=None):
    """A zip whose directory says other flags or another compression method, or with one byte of content changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("text"), b"text " * 100, compression)
    content = bytearray(buffer.getvalue())
    entry = content.rindex(b"PK\1\2")
    content[entry + 8] |= flags
    content[entry + 10] = content[entry + 10] if method is None else method
    if byte is not None:
        content[byte] ^= 255
    return bytes(content)


@pytest.mark.parametrize("name", ["text.txt", "text", "text.txt.gz", "text.zip"])
def test_a_file_is_split_90_5_5_percent_in_order(tmp_path, name):
    content = bytes(range(200)) + b"rest"
    loaded = load_corpus(write(tmp_path / name, content))
    assert [len(part) for part in parts(loaded)] == [184, 10, 10]
    assert b"".join(parts(loaded)) == content


@pytest.mark.parametrize("name", ["enwik8", "enwik8.gz", "enwik8.zip"])
def test_enwik8_is_split_by_millions_of_bytes(tmp_path, name):
    content = b"a" * 90_000_000 + b"b" * 5_000_000 + b"c" * 5_000_000
    loaded = load_corpus(write(tmp_path / name, content))
    sizes = [(part.numel(), part.unique().tolist()) for part in (loaded.train, loaded.valid, loaded.test)]
    assert sizes == [(90_000_000, [ord("a")]), (5_000_000, [ord("b")]), (5_000_000, [ord("c")])]


def test_enwik8_of_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"enwik8 has 100,000,000 bytes; .* has 1,000"):
        load_corpus(write(tmp_path / "enwik8", b"a" * 1000))


def test_the_default_is_the_standard_library_without_tests_and_packages():
    loaded = load_corpus(None)
    text = b"".join(parts(loaded))
    assert 1_000_000 < len(text) <= corpus.STDLIB_LIMIT
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    assert text.startswith((stdlib / "__future__.py").read_bytes())
    assert (stdlib / "argparse.py").read_bytes() in text
    assert b"import torch" not in text
    assert load_corpus(None).sha256 == loaded.sha256


def test_standard_library_source_is_sorted_and_bounded(tmp_path, monkeypatch):
    for name in ("b.py", "a.py", "test/test_a.py", "site-packages/x.py", "c/d.py", "a.txt", "_sysconfigdata_linux.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"<{name}>")
    assert corpus.stdlib_source(tmp_path) == b"<a.py><b.py><c/d.py>"
    monkeypatch.setattr(corpus, "STDLIB_LIMIT", 8)
    assert corpus.stdlib_source(tmp_path) == b"<a.py><b"


def test_a_python_without_sources_asks_for_a_file(tmp_path):
    with pytest.raises(ValueError, match="give a file with --data"):
        corpus.stdlib_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "no such data file"),
        ("bad.gz", b"not gzip", "cannot read"),
        ("cut.gz", gzip.compress(b"text" * 100, mtime=0)[:-9], "cannot read"),
        ("bad.zip", b"not zip", "cannot read"),
        ("encrypted.zip", spoiled_zip(flags=1), "encrypted.zip: File 'text' is encrypted"),
        ("method.zip", spoiled_zip(method=99), "method.zip: That compression method is not supported"),
        ("lzma.zip", spoiled_zip(zipfile.ZIP_LZMA, byte=60), "cannot read"),
        ("short.txt", b"too short", "too short to split: 9 bytes"),
        ("empty.txt", b"", "empty.txt must not be empty"),
        ("empty.gz", gzip.compress(b"", mtime=0), "empty.gz must not be empty"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_corpus(path)


@pytest.mark.parametrize("empty", ["train", "valid"])
def test_neither_of_two_files_may_be_empty(tmp_path, empty):
    files = {name: write(tmp_path / name, b"" if name == empty else b"text") for name in ("train", "valid")}
    with pytest.raises(ValueError, match=f"{empty} must not be empty"):
        load_corpus(files["train"], files["valid"])


def test_one_file_is_known_by_its_own_sha256(tmp_path):
    content = bytes(range(200))
    assert load_corpus(write(tmp_path / "text.gz", content)).sha256 == hashlib.sha256(content).hexdigest()


def test_the_sha256_tells_other_files_and_other_cuts_of_the_same_bytes_apart(tmp_path):
    text = bytes(range(200))
    corpora = [load_corpus(write(tmp_path / "whole", text))]
    for train, valid in ((text[:100], text[100:]), (text[:150], text[150:]), (text[100:], text[:100]), (text, text)):
        corpora.append(load_corpus(write(tmp_path / "train", train), write(tmp_path / "valid", valid)))
    assert all(len(corpus.sha256) == 64 for corpus in corpora)
    for one, other in itertools.combinations(corpora, 2):
        assert one.sha256 != other.sha256


def test_the_sha256_of_two_files_is_the_same_under_other_names(tmp_path):
    def sha256(*names):
        paths = [write(tmp_path / name, content) for name, content in zip(names, (b"train", b"valid"), strict=True)]
        return load_corpus(*paths).sha256

    assert sha256("a.txt", "b.txt") == sha256("c.gz", "d.zip")


def test_a_zip_must_hold_one_file(tmp_path):
    path = tmp_path / "two.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("one", "1")
        archive.writestr("two", "2")
    with pytest.raises(ValueError, match="exactly one file; it holds 2: one, two"):
        load_corpus(path)
