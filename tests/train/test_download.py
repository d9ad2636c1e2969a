"""`fastmoe data`: from a local server, from an archive put there by hand, and what is not the data set."""

import hashlib
import http.server
import io
import threading
import zipfile

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
        archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def server():
    """Serves `pages`; of `/cut` it says a length that it does not send."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            pages = self.server.pages
            if self.path not in pages:
                self.send_error(404)
                return
            self.server.asked += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(pages[self.path]) + (self.path == "/cut") * 10))
            self.end_headers()
            self.wfile.write(pages[self.path])

        def log_message(self, *arguments):
            pass

    started = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    started.pages = {"/zip": zipped(CONTENT), "/cut": zipped(CONTENT), "/html": b"<html>", "/other": zipped(b"x", "y")}
    started.asked = 0
    thread = threading.Thread(target=started.serve_forever)
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


@pytest.mark.parametrize(
    ("data", "message", "left"),
    [
        ({"sha256": "0" * 64}, "has the SHA-256 0000", ["enwik8.zip"]),
        ({"size": 7}, "enwik8 has 7 bytes; ", ["enwik8.zip"]),
        ({"page": "/html"}, "is not enwik8's archive: File is not a zip file; delete it", ["enwik8.zip"]),
        ({"page": "/other"}, "is not enwik8's archive", ["enwik8.zip"]),
        ({"page": "/cut"}, "cannot fetch", []),
        ({"page": "/nowhere"}, "HTTP Error 404", []),
    ],
)
def test_what_is_not_the_data_set_is_not_left_under_its_name(at, tmp_path, data, message, left, capsys):
    at(**data)
    assert main(["data", "enwik8", "--to", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == left


def test_without_internet_it_says_how_to_do_it_by_hand(at, server, tmp_path):
    data = at()
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=r"By hand: fetch http://.*; put it here as .*enwik8.zip, or the"):
        fetch(data, tmp_path, Console(quiet=True))
    (tmp_path / "enwik8.zip").write_bytes(zipped(CONTENT))
    assert fetch(data, tmp_path, Console(quiet=True)).read_bytes() == CONTENT


def test_a_file_put_there_by_hand_is_checked(at, tmp_path):
    (tmp_path / "enwik8").write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(ValueError, match="has the SHA-256"):
        fetch(at(), tmp_path, Console(quiet=True))


def test_enwik8_is_known_by_its_size():
    assert DATA_SETS["enwik8"].size == 100_000_000
