import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from official_formats import cifar10_binary, images, md5, write_archive

from plasticity_probe.data import download
from plasticity_probe.data.download import REMOTES, Remote, fetch
from plasticity_probe.data.sources import load_data
from plasticity_probe.errors import DataError, UnknownNameError

CONTENT = bytes(range(256)) * 3000


class Server:
    """Serves `files`, and notes what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.ranges = True
        self.break_after: int | None = None
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_port}/files/"


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers["Range"]
            server.asked.append((self.path, wanted))
            content = server.files.get(self.path.removeprefix("/files/"))
            start = int(re.sub(r"\D", "", wanted)) if wanted and server.ranges else 0
            if content is None or start >= len(content):
                self.send_error(404 if content is None else 416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            self.wfile.write(content[start:] if server.break_after is None else content[start:][: server.break_after])

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.fixture
def remotes(monkeypatch, server):
    """Two official files on the local server in place of the real ones."""
    server.files = {"a.bin": CONTENT, "b.bin": CONTENT[::-1]}
    files = (
        Remote("set/a.bin", md5(CONTENT), (server.url,)),
        Remote("set/b.bin", md5(CONTENT[::-1]), (server.url + "nowhere/", server.url)),
    )
    monkeypatch.setattr(download, "REMOTES", {"set": files})


def test_files_come_from_the_first_mirror_that_has_them(tmp_path, server, remotes):
    seen = []
    paths = fetch("set", tmp_path / "new/root", progress=lambda *args: seen.append(args))
    assert paths == (tmp_path / "new/root/set/a.bin", tmp_path / "new/root/set/b.bin")
    assert [path.read_bytes() for path in paths] == [CONTENT, CONTENT[::-1]]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["a.bin", "b.bin"]
    assert ("b.bin", len(CONTENT), len(CONTENT)) in seen
    assert [done for name, done, _ in seen if name == "a.bin"] == sorted(
        done for name, done, _ in seen if name == "a.bin"
    )


def test_a_file_that_is_there_is_not_fetched_again(tmp_path, server, remotes):
    fetch("set", tmp_path)
    asked = len(server.asked)
    fetch("set", tmp_path)
    assert len(server.asked) == asked


def test_a_file_with_another_checksum_is_replaced(tmp_path, server, remotes):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.bin").write_bytes(b"old")
    fetch("set", tmp_path)
    assert (tmp_path / "set/a.bin").read_bytes() == CONTENT


def test_a_wrong_checksum_keeps_what_was_there_and_nothing_else(tmp_path, server, remotes):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.bin").write_bytes(b"old")
    server.files["a.bin"] = CONTENT[:-1] + b"!"
    with pytest.raises(
        DataError, match=rf"checksum must be {md5(CONTENT)}, but is [0-9a-f]{{32}}.*put the file at .*a\.bin yourself"
    ):
        fetch("set", tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == {"a.bin": b"old"}


def test_a_broken_transfer_is_resumed(tmp_path, server, remotes):
    server.break_after = 100_000
    with pytest.raises(DataError, match="the connection broke after 100000 of 768000 bytes"):
        fetch("set", tmp_path)
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["a.bin.part"]
    server.break_after = None
    fetch("set", tmp_path)
    assert ("/files/a.bin", "bytes=100000-") in server.asked
    assert (tmp_path / "set/a.bin").read_bytes() == CONTENT


def test_a_server_that_cannot_resume_sends_it_all(tmp_path, server, remotes):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.bin.part").write_bytes(CONTENT[:50])
    server.ranges = False
    fetch("set", tmp_path)
    assert (tmp_path / "set/a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("left", [b"of another file", CONTENT + b"too long", CONTENT])
def test_a_useless_rest_is_thrown_away(tmp_path, server, remotes, left):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.bin.part").write_bytes(left)
    fetch("set", tmp_path)
    assert (tmp_path / "set/a.bin").read_bytes() == CONTENT
    assert not (tmp_path / "set/a.bin.part").exists()


def test_every_mirror_that_failed_is_listed(tmp_path, server, remotes):
    del server.files["b.bin"]
    with pytest.raises(DataError, match=r"nowhere/b\.bin: HTTP 404 Not Found; http://.*/files/b\.bin: HTTP 404"):
        fetch("set", tmp_path)


def test_a_mirror_of_ones_own(tmp_path, server, remotes):
    fetch("set", tmp_path, server.url.rstrip("/"))
    assert {path for path, _ in server.asked} == {"/files/a.bin", "/files/b.bin"}


def test_no_server_and_no_folder_are_data_errors(tmp_path, remotes):
    with pytest.raises(DataError, match="URLError"):
        fetch("set", tmp_path, "http://127.0.0.1:9/")
    with pytest.raises(DataError, match="unknown url type"):
        fetch("set", tmp_path, "nonsense")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose another --data-root"):
        fetch("set", tmp_path / "file")


def test_an_unknown_name():
    with pytest.raises(UnknownNameError, match="no data set to download named 'digits'"):
        fetch("digits", "unused")  # type: ignore[arg-type]


def test_load_data_downloads_only_what_is_missing(tmp_path, server, monkeypatch):
    train, test = images(10, (3, 32, 32), 10, seed=1), images(3, (3, 32, 32), 10, seed=2)
    write_archive(tmp_path / "built.tar.gz", "cifar-10-batches-bin", cifar10_binary(train, test))
    content = (tmp_path / "built.tar.gz").read_bytes()
    server.files["cifar-10-binary.tar.gz"] = content
    table = {"cifar10": (Remote("cifar-10-binary.tar.gz", md5(content), (server.url,)),)}
    monkeypatch.setattr(download, "REMOTES", table)
    with pytest.raises(DataError, match="fetch it with --download"):
        load_data("cifar10", root=tmp_path / "root")
    assert server.asked == []
    for _ in range(2):
        data = load_data("cifar10", root=tmp_path / "root", download=True)
        assert data.name == "cifar10"
    assert len(server.asked) == 1


def test_the_table_names_official_files_and_whole_folders():
    assert set(REMOTES) == {"mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100"}
    for files in REMOTES.values():
        for file in files:
            assert re.fullmatch("[0-9a-f]{32}", file.md5)
            assert file.mirrors[0].startswith("https://")
            assert all(mirror.endswith("/") for mirror in file.mirrors)
    assert [file.path for file in REMOTES["kmnist"]] == [
        f"KMNIST/raw/{name}-ubyte.gz"
        for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    ]
    assert REMOTES["cifar100"][0].path == "cifar-100-binary.tar.gz"
