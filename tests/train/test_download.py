"""`fastmoe data`: from a local server, from an archive put there by hand, and what is not the data set."""

import errno
import hashlib
import http.server
import io
import threading
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from fastmoe.cli import main
from fastmoe.train import download
from fastmoe.train.download import DATA_SETS, DataSet, fetch

CONTENT = b"<page> wiki </page>\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def zipped(content, name="enwik8"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def spoiled(**bytes_of_entry):
    """The archive with other bytes in its directory's entry."""
    content = bytearray(zipped(CONTENT))
    for place, value in bytes_of_entry.items():
        content[content.rindex(b"PK\1\2") + {"flags": 8, "method": 10}[place]] = value
    return bytes(content)


def damaged():
    content = bytearray(zipped(CONTENT))
    content[40:60] = b"\xff" * 20
    return bytes(content)


PAGES = {
    "/zip": zipped(CONTENT),
    "/cut": zipped(CONTENT),
    "/html": b"<html>",
    "/other": zipped(b"x", "y"),
    "/damaged": damaged(),
    "/encrypted": spoiled(flags=1),
    "/method": spoiled(method=99),
}
RAW = {
    "/chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\nPK",
    "/smtp": b"220 mail.example ready\r\n",
    "/length": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n" + zipped(CONTENT),
}


@pytest.fixture
def server():
    """Serves `PAGES`, and `RAW` without a header of its own; of `/cut` it says a length that it does not send."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked += 1
            if self.path in RAW:
                self.wfile.write(RAW[self.path])
            elif self.path in PAGES:
                self.send_response(200)
                self.send_header("Content-Length", str(len(PAGES[self.path]) + (self.path == "/cut") * 10))
                self.end_headers()
                self.wfile.write(PAGES[self.path])
            else:
                self.send_error(404)

        def log_message(self, *arguments):
            pass

    started = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    started.asked = 0
    thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield started
    started.shutdown()
    started.server_close()
    thread.join()


@pytest.fixture
def at(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def make(page="/zip", size=20_000, sha256=SHA256):
        data = DataSet("enwik8", f"http://127.0.0.1:{server.server_port}{page}", size, sha256)
        monkeypatch.setitem(download.DATA_SETS, "enwik8", data)
        return data

    return make


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_is_fetched_once_and_whole(at, server, tmp_path, capsys):
    at()
    for _ in range(2):
        assert main(["data", "enwik8", "--to", str(tmp_path / "data")]) == 0
        assert "20,000 bytes, checksum right" in capsys.readouterr().out
    assert (tmp_path / "data" / "enwik8").read_bytes() == CONTENT
    assert names(tmp_path / "data") == ["enwik8"]
    assert server.asked == 1


WRONG_ARCHIVES = [
    ("/html", "it cannot be unpacked: File is not a zip file"),
    ("/other", "it cannot be unpacked: \"There is no item named 'enwik8' in the archive\""),
    ("/damaged", "it cannot be unpacked: Error -3 while decompressing data"),
    ("/encrypted", "it cannot be unpacked: File 'enwik8' is encrypted"),
    ("/method", "it cannot be unpacked: That compression method is not supported"),
]
CONTENT_WRONG = [
    ({"sha256": "0" * 64}, f"enwik8 has the SHA-256 {'0' * 64}; this has {SHA256}"),
    ({"size": 7}, "enwik8 has 7 bytes; this has 20,000"),
]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *CONTENT_WRONG,
        *(({"page": page}, message) for page, message in WRONG_ARCHIVES),
        ({"page": "/cut"}, f"the connection ended after {len(PAGES['/cut'])} of {len(PAGES['/cut']) + 10} bytes"),
        ({"page": "/nowhere"}, "HTTP Error 404"),
        ({"page": "/chunked"}, "the server's answer is cut off, or is not HTTP: IncompleteRead("),
        ({"page": "/smtp"}, "the server's answer is cut off, or is not HTTP: BadStatusLine('220 mail.example ready"),
        ({"page": "/length"}, "the server's Content-Length must be a number of bytes; it is 'many'"),
    ],
)
def test_a_wrong_download_is_named_by_its_url_and_deleted(at, tmp_path, wrong, message, capsys):
    data = at(**wrong)
    assert main(["data", "enwik8", "--to", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastmoe data: enwik8 cannot be had from {data.url}: {message}")
    assert said.endswith(f". Try again, or {data.by_hand(tmp_path)}\n")
    assert said.count("\n") == 1
    assert names(tmp_path) == []
    at()
    assert main(["data", "enwik8", "--to", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("content", "wrong", "message"),
    [
        *((zipped(CONTENT), *wrong) for wrong in CONTENT_WRONG),
        *((PAGES[page], {}, message) for page, message in WRONG_ARCHIVES),
    ],
)
def test_a_wrong_archive_of_the_users_own_is_named_and_kept(at, server, tmp_path, content, wrong, message, capsys):
    data, archive = at(**wrong), tmp_path / "enwik8.zip"
    archive.write_bytes(content)
    assert main(["data", "enwik8", "--to", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastmoe data: enwik8 cannot be had from {archive}: {message}")
    assert said.endswith(f". Delete it and try again, or {data.by_hand(tmp_path)}\n")
    assert names(tmp_path) == ["enwik8.zip"]
    assert archive.read_bytes() == content
    assert server.asked == 0


def test_a_wrong_file_put_there_by_hand_is_named_and_kept(at, server, tmp_path, capsys):
    data, path = at(), tmp_path / "enwik8"
    path.write_bytes(CONTENT[:-1] + b"x")
    assert main(["data", "enwik8", "--to", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastmoe data: enwik8 cannot be had from {path}: enwik8 has the SHA-256 {SHA256}; this has")
    assert said.endswith(f". Delete it and try again, or {data.by_hand(tmp_path)}\n")
    assert names(tmp_path) == ["enwik8"]
    assert server.asked == 0


def test_without_internet_it_says_how_to_do_it_by_hand(at, server, tmp_path):
    data = at()
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=r"Try again, or fetch http://.*; put it here as .*enwik8.zip, or the"):
        fetch(data, tmp_path, Console(quiet=True))
    (tmp_path / "enwik8.zip").write_bytes(zipped(CONTENT))
    assert fetch(data, tmp_path, Console(quiet=True)).read_bytes() == CONTENT
    assert names(tmp_path) == ["enwik8", "enwik8.zip"]


def test_the_help_says_which_archive_is_kept(capsys):
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    assert "An archive of your own is kept" in " ".join(capsys.readouterr().out.split())


def interrupt(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["content_length", "receive", "unpack", "check"])
def test_an_interruption_is_one_line_and_leaves_nothing(at, tmp_path, monkeypatch, step, capsys):
    data = at()
    with monkeypatch.context() as patch:
        patch.setattr(download, step, interrupt)
        assert main(["data", "enwik8", "--to", str(tmp_path)]) == 130
    said = capsys.readouterr().err
    assert said == f"fastmoe data: interrupted. Call it again, or {data.by_hand(tmp_path)}\n"
    assert names(tmp_path) == []


def test_what_a_killed_call_left_is_fetched_anew(at, tmp_path):
    for name in ("enwik8.partial", "enwik8.zip.partial"):
        (tmp_path / name).write_bytes(b"half")
    assert fetch(at(), tmp_path, Console(quiet=True)).read_bytes() == CONTENT
    assert names(tmp_path) == ["enwik8"]


def test_a_place_that_is_taken_is_refused_before_anything_is_fetched(at, server, tmp_path, capsys):
    at()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "enwik8").mkdir(parents=True)
    for to, message in (
        ("file", f"--to must be a folder to put enwik8 in; {tmp_path / 'file'} is a file"),
        ("file/below", f"cannot read and write in {tmp_path / 'file' / 'below'}: "),
        ("folder", f"{tmp_path / 'folder' / 'enwik8'} must be a file; it is a folder. Move it away, or choose"),
    ):
        assert main(["data", "enwik8", "--to", str(tmp_path / to)]) == 2
        assert capsys.readouterr().err.startswith(f"fastmoe data: {message}")
    assert server.asked == 0
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_not_the_archives_fault(at, tmp_path, monkeypatch, capsys):
    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    at()
    (tmp_path / "enwik8.zip").write_bytes(zipped(CONTENT))
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r": Full() if mode == "wb" else opened(path, mode))
    assert main(["data", "enwik8", "--to", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said == f"fastmoe data: cannot read and write in {tmp_path}: [Errno 28] No space left on device\n"


def test_the_progress_ends_with_all_bytes(at, tmp_path):
    console = Console(record=True, file=io.StringIO(), width=100)
    fetch(at(), tmp_path, console)
    size = len(PAGES["/zip"])
    assert f"{size}/{size} bytes" in console.export_text()


def test_enwik8_is_known_by_its_home_page_size_and_checksum():
    data = DATA_SETS["enwik8"]
    assert (data.name, data.url, data.size, data.sha256) == (
        "enwik8",
        "http://mattmahoney.net/dc/enwik8.zip",
        100_000_000,
        "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    )
