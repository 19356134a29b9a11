"""The download script, against a server on this machine that breaks in every way a long download can break."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import shutil
import stat
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mri_posterior.errors import UserError

SCRIPT = Path(__file__).parents[1] / "data_scripts" / "download_fastmri.py"
SECRET = "AWSAccessKeyId=AKIASECRET&Signature=s3cr3t%3D&Expires=1"


def load_script():
    spec = importlib.util.spec_from_file_location("download_fastmri", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def tar_bytes(entries: dict[str, bytes | tarfile.TarInfo], mode: str = "w:xz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in entries.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content) if isinstance(content, bytes) else 0
            tar.addfile(info, io.BytesIO(content if isinstance(content, bytes) else b""))
    return buffer.getvalue()


def zip_bytes(entries: dict[str, bytes], mode: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            zipped.writestr(info, content)
    return buffer.getvalue()


NAME = "knee_singlecoil_val.tar.xz"
NOISE = b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(2000))
FILES = {"singlecoil_val/file1.h5": NOISE, "singlecoil_val/file2.h5": b"two"}
KNEE = tar_bytes(FILES)


@dataclass
class Server:
    """What is served, how it misbehaves, and what was asked of it: (name, Range)."""

    port: int
    files: dict[str, bytes] = field(default_factory=lambda: {NAME: KNEE})
    etag: str = '"v1"'
    ranges: bool = True  # whether Range is honoured
    status: dict[str, list[int]] = field(default_factory=dict)  # by name: the next answers' status, before it serves
    drop_after: list[int] = field(default_factory=list)  # bytes sent by the next answers before the line goes dead
    requests: list[tuple[str, str | None]] = field(default_factory=list)

    def link(self, name: str = NAME) -> str:
        return f"http://127.0.0.1:{self.port}/v2.0/{name}?{SECRET}"

    def body_requests(self) -> list[str | None]:
        """The ranges asked for, without the one-byte questions for the size."""
        return [wanted for _, wanted in self.requests if wanted != "bytes=0-0"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server: Server = self.server.state
        name = self.path.partition("?")[0].rpartition("/")[2]
        wanted = self.headers.get("Range")
        server.requests.append((name, wanted))
        self.close_connection = True
        statuses = server.status.get(name, [])
        status = statuses.pop(0) if statuses else 200 if name in server.files else 404
        if status != 200 or self.path.partition("?")[2] != SECRET:
            return self.answer(status if status != 200 else 403, {"Location": self.path}, b"<Error/>")
        content, headers = server.files[name], {"ETag": server.etag}
        unchanged = self.headers.get("If-Range") in (None, server.etag)
        if wanted and server.ranges and unchanged:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            if int(first) >= len(content):
                return self.answer(416, {}, b"<Error/>")
            stop = int(last) + 1 if last else len(content)
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
            return self.answer(206, headers, content[int(first) : stop])
        return self.answer(200, headers, content)

    def do_HEAD(self) -> None:
        self.answer(403, {}, b"")  # as S3 does when the signature is for GET

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if len(body) > 1 and status in (200, 206) and self.server.state.drop_after:
            body = body[: self.server.state.drop_after.pop(0)]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client may only want the size
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def http() -> Iterator[ThreadingHTTPServer]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield http
    http.shutdown()
    thread.join(5)
    http.server_close()


@pytest.fixture
def server(http, monkeypatch) -> Server:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    http.state = Server(http.server_port)
    return http.state


@pytest.fixture
def run(server, tmp_path, capfd):
    """Run the script as a user would; returns exit code and everything printed, which never holds the secret."""

    def run(*options: str, links: list[str] | None = None, yes: bool = True) -> tuple[int, str]:
        mail = "Dear fastMRI user,\n" + "\n".join(
            f'curl -C - "{link}" --output x' for link in (links or [server.link()])
        )
        (tmp_path / "mail.txt").write_text(mail)
        arguments = ["--links", str(tmp_path / "mail.txt"), "--output", str(tmp_path / "data")]
        code = script.main([*arguments, *(["--yes"] if yes else []), *options], wait=wait)
        printed = "".join(capfd.readouterr())
        for secret in (SECRET, "AKIASECRET", "s3cr3t", "Traceback"):
            assert secret not in printed
        return code, printed

    def wait(seconds: float) -> None:
        run.waits.append(seconds)
        run.on_wait()

    run.waits, run.on_wait = [], lambda: None
    run.data = tmp_path / "data"
    return run


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# The mail


def test_links_are_found_in_a_mail():
    text = f"""
    To download Knee MRI, use:
    curl -C - "https://fastmri-dataset.s3.amazonaws.com/v2.0/knee_singlecoil_val.tar.xz?{SECRET}" --output knee.tar.xz
    <a href="https://fastmri-dataset.s3.amazonaws.com/brain_fastMRI_DICOM.tar.gz?{SECRET.replace("&", "&amp;")}">x</a>
    (https://fastmri-dataset.s3.amazonaws.com/plain.tar), https://fastmri-dataset.s3.amazonaws.com/a.zip?{SECRET}.
    Not these: https://fastmri.med.nyu.edu/ https://x.org/a.pdf?f=b.tar http://x.org/insecure.tar https://x.org/.tar
    ftp://x.org/c.tar https://[::1/d.tar https://x.org/%2e%2e%2fe.tar
    """
    archives = script.find_links(text)
    assert [archive.name for archive in archives] == [
        "knee_singlecoil_val.tar.xz",
        "brain_fastMRI_DICOM.tar.gz",
        "plain.tar",
        "a.zip",
    ]
    assert {archive.url.partition("?")[2] for archive in archives} == {SECRET, ""}
    assert [archive.folder for archive in archives] == ["knee_singlecoil_val", "brain_fastMRI_DICOM", "plain", "a"]
    assert [archive.name for archive in script.find_links(text, "knee*")] == ["knee_singlecoil_val.tar.xz"]


def test_the_last_of_two_links_to_one_archive_counts():
    (archive,) = script.find_links("https://x.org/a.tar?old https://x.org/a.tar?new")
    assert archive.url == "https://x.org/a.tar?new"


@pytest.mark.parametrize(
    ("text", "pattern", "reason"),
    [
        ("nothing here", "*", "no https links"),
        ("https://x.org/a.tar", "b*", "fits none of a.tar"),
        ("https://x.org/v1/a.tar https://x.org/v2/a.tar", "*", "two different archives"),
    ],
)
def test_mails_that_do_not_do(text, pattern, reason):
    with pytest.raises(UserError, match=reason):
        script.find_links(text, pattern)


def test_a_missing_mail_or_checksum_list(run, tmp_path, capfd):
    assert script.main(["--links", str(tmp_path / "none.txt"), "--output", str(tmp_path)]) == 2
    assert "none.txt: No such file" in capfd.readouterr().err
    code, printed = run("--sha256", str(tmp_path / "none"))
    assert code == 2
    assert "No such file" in printed
    assert not run.data.exists()


# Downloads that go well


def test_download_and_unpack(run, server):
    code, printed = run()
    assert code == 0
    assert names(run.data) == [NAME, "knee_singlecoil_val/file1.h5", "knee_singlecoil_val/file2.h5"]
    assert (run.data / NAME).read_bytes() == KNEE
    assert (run.data / "knee_singlecoil_val/file1.h5").read_bytes() == NOISE
    assert stat.S_IMODE((run.data / "knee_singlecoil_val").stat().st_mode) & 0o500 == 0o500
    assert "data use agreement" in printed
    assert f"{NAME}: 0.1 MB" in printed
    assert run.waits == []


def test_a_second_run_has_nothing_to_do(run, server):
    run()
    server.requests.clear()
    code, _ = run()
    assert code == 0
    assert server.body_requests() == []


def test_no_unpack(run):
    code, _ = run("--no-unpack")
    assert code == 0
    assert names(run.data) == [NAME]


def test_only_takes_what_fits(run, server):
    server.files["brain.zip"] = zip_bytes({"a.h5": b"a", "sub/b.h5": b"b"})
    code, _ = run("--only", "brain*", links=[server.link(), server.link("brain.zip")])
    assert code == 0
    assert names(run.data) == ["brain.zip", "brain/a.h5", "brain/sub/b.h5"]


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 2), ("", 2)])
def test_it_asks_first(run, server, monkeypatch, answer, code):
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    assert run(yes=False)[0] == code
    assert run.data.exists() == (code == 0)
    assert len(server.body_requests()) == (code == 0)


# Connections that break


def test_a_dropped_connection_goes_on_where_it_stopped(run, server):
    server.drop_after = [1000, 20_000]
    code, _ = run()
    assert code == 0
    assert server.body_requests() == [None, "bytes=1000-", "bytes=21000-"]
    assert (run.data / NAME).read_bytes() == KNEE
    assert len(run.waits) == 2


def test_it_goes_on_after_it_gave_up(run, server):
    server.drop_after = [1000] + [0] * 20
    code, printed = run()
    assert code == 1
    assert "keeps failing" in printed
    (part,) = run.data.iterdir()
    assert part.name.endswith(".part")
    assert part.stat().st_size == 1000
    assert run.waits == [1, 2, 4, 8, 16, 32]
    server.drop_after = []
    server.requests.clear()
    assert run()[0] == 0
    assert server.body_requests() == ["bytes=1000-"]
    assert (run.data / NAME).read_bytes() == KNEE


def test_progress_is_as_good_as_a_fresh_start(run, server):
    server.drop_after = [1000] * 20
    assert run()[0] == 0
    assert set(run.waits) == {1}


def test_a_server_that_knows_no_ranges_starts_over(run, server):
    server.ranges = False
    server.drop_after = [1000]
    assert run()[0] == 0
    assert (run.data / NAME).read_bytes() == KNEE


def test_another_version_of_the_file_is_not_glued_on(run, server):
    server.drop_after = [1000] + [0] * 20
    assert run("--no-unpack")[0] == 1
    server.files[NAME], server.etag, server.drop_after = KNEE[::-1], '"v2"', []
    assert run("--no-unpack")[0] == 0
    assert (run.data / NAME).read_bytes() == KNEE[::-1]


def test_a_file_that_changes_meanwhile_is_not_glued_together(run, server):
    server.drop_after = [1000]
    run.on_wait = lambda: (server.files.update({NAME: KNEE[::-1]}), setattr(server, "etag", '"v2"'))
    assert run("--no-unpack")[0] == 0
    assert (run.data / NAME).read_bytes() == KNEE[::-1]


def test_a_server_that_starts_over_for_ever_is_given_up(run, server):
    server.ranges = False
    server.drop_after = [1000, 500] * 50
    assert run()[0] == 1
    assert len(run.waits) < 10


def test_a_server_that_never_stops_cannot_fill_the_disk(server, tmp_path):
    server.files[NAME] = bytes(5 * 2**20)
    with script.requests.Session() as session:
        (tmp_path / "part").touch()
        script.fetch(session, script.Archive(NAME, server.link(), size=10), tmp_path / "part")
    assert (tmp_path / "part").stat().st_size < 2 * 2**20


def test_a_complete_part_is_not_fetched_again(run, server):
    assert run("--no-unpack")[0] == 0
    archive = script.Archive(NAME, server.link(), len(KNEE), server.etag)
    (run.data / NAME).rename(run.data / archive.part_name)
    server.requests.clear()
    assert run()[0] == 0
    assert server.body_requests() == []
    assert (run.data / NAME).read_bytes() == KNEE


def test_too_many_bytes_are_never_kept(run, server):
    run("--no-unpack")
    archive = script.Archive(NAME, server.link(), size=len(KNEE) - 5, etag="")
    with script.requests.Session() as session, pytest.raises(script.DownloadError):
        script.download(session, archive, run.data.parent, None, run.waits.append)
    assert not (run.data.parent / NAME).exists()


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_server_is_asked_again(run, server, status):
    server.status = {NAME: [status, 200, status]}
    assert run()[0] == 0
    assert len(run.waits) == 2


@pytest.mark.parametrize(
    ("status", "code", "reason"), [(403, 2, "expired"), (404, 2, "404"), (301, 2, "301"), (500, 1, "keeps failing")]
)
def test_links_that_lead_nowhere(run, server, status, code, reason):
    server.status = {NAME: [status] * 20}
    assert run()[0] == code
    server.status = {NAME: [status] * 20}
    printed = run()[1]
    assert reason in printed
    assert f"127.0.0.1:{server.port}/v2.0/{NAME}: " in printed
    assert not run.data.exists()


def test_a_link_that_expires_meanwhile_keeps_what_there_is(run, server):
    server.status = {NAME: [200, 200, 403]}
    server.drop_after = [1000]
    code, printed = run()
    assert code == 1
    assert "expired" in printed
    assert [path.stat().st_size for path in run.data.iterdir()] == [1000]


def test_no_server_at_all(run):
    code, printed = run(links=[f"http://127.0.0.1:1/a.tar?{SECRET}"])
    assert code == 1
    assert "keeps failing" in printed


def test_one_failure_does_not_stop_the_others(run, server):
    server.files["a.tar"] = b"not a tar"
    code, printed = run(links=[server.link("a.tar"), server.link()])
    assert code == 1
    assert "cannot be unpacked" in printed
    assert "knee_singlecoil_val/file1.h5" in names(run.data)


# Disks and folders


def test_a_full_disk_is_found_before_the_download(run, server, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, len(KNEE)))
    code, printed = run()
    assert code == 2
    assert f"needs {2 * len(KNEE):,} bytes but {len(KNEE):,} are free" in printed
    assert not run.data.exists()
    assert run("--no-unpack")[0] == 0


def test_only_what_is_still_missing_needs_space(run, server, monkeypatch):
    server.drop_after = [1000] + [0] * 20
    assert run("--no-unpack")[0] == 1
    server.drop_after = []
    for free, code in ((len(KNEE) - 1001, 2), (len(KNEE) - 1000, 0)):
        usage = shutil._ntuple_diskusage(10**9, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert run("--no-unpack")[0] == code


def test_output_that_is_a_file(run):
    run.data.write_text("mine")
    code, printed = run()
    assert code == 2
    assert "data: File exists" in printed
    assert run.data.read_text() == "mine"


def test_a_file_of_the_same_name_is_not_overwritten(run):
    run.data.mkdir()
    (run.data / NAME).write_text("mine")
    code, printed = run()
    assert code == 2
    assert "another size" in printed
    assert (run.data / NAME).read_text() == "mine"


# Checks


def checksums(tmp_path: Path, content: bytes, name: str = NAME) -> tuple[str, str]:
    (tmp_path / "SHA256").write_text(f"\n{hashlib.sha256(content).hexdigest().upper()} *v2.0/{name}\n")
    return "--sha256", str(tmp_path / "SHA256")


def test_right_checksum(run, tmp_path):
    assert run(*checksums(tmp_path, KNEE))[0] == 0


def test_wrong_bytes_are_removed(run, server, tmp_path):
    server.files[NAME] = bytes([*KNEE[:500], KNEE[500] ^ 1, *KNEE[501:]])
    code, printed = run(*checksums(tmp_path, KNEE))
    assert code == 1
    assert "SHA-256" in printed
    assert list(run.data.iterdir()) == []


def test_an_archive_that_is_there_is_held_to_its_checksum_too(run, tmp_path):
    run("--no-unpack")
    assert run(*checksums(tmp_path, b"other"))[0] == 1
    assert names(run.data) == [NAME]


def test_a_list_without_the_archive(run, tmp_path):
    code, printed = run(*checksums(tmp_path, KNEE, "other.tar"))
    assert code == 2
    assert f"no SHA-256 of {NAME}" in printed


def test_verify(run, server, tmp_path):
    right, by_size = checksums(tmp_path, KNEE), ()
    for options in (right, by_size):
        code, printed = run("--verify", *options)
        assert code == 1
        assert "missing" in printed
    assert not run.data.exists()
    run("--no-unpack")
    server.requests.clear()
    assert run("--verify", *right)[0] == 0
    assert server.requests == []  # needs no link that still works
    assert run("--verify")[0] == 0
    (run.data / NAME).write_bytes(b"x" + KNEE[1:])
    assert run("--verify", *right)[0] == 1
    (run.data / NAME).write_bytes(KNEE[1:])
    assert run("--verify")[0] == 1
    assert names(run.data) == [NAME]


# Archives that must not be unpacked


def tar_entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


EVIL = {
    "climbing.tar": tar_bytes({"ok.h5": b"ok", "../evil.txt": b"evil"}, "w:"),
    "inner.tar": tar_bytes({"a/../../evil.txt": b"evil"}, "w:"),
    "absolute.tar": tar_bytes({"/tmp/evil.txt": b"evil"}, "w:"),
    "windows.tar": tar_bytes({"..\\evil.txt": b"evil"}, "w:"),
    "symlink.tar.gz": tar_bytes({"l": tar_entry("l", tarfile.SYMTYPE, ".."), "l/evil.txt": b"evil"}, "w:gz"),
    "tame_symlink.tar": tar_bytes({"a": b"a", "l": tar_entry("l", tarfile.SYMTYPE, "a")}, "w:"),
    "hardlink.tar": tar_bytes({"l": tar_entry("l", tarfile.LNKTYPE, "/etc/passwd")}, "w:"),
    "device.tar": tar_bytes({"d": tar_entry("d", tarfile.CHRTYPE)}, "w:"),
    "pipe.tar": tar_bytes({"p": tar_entry("p", tarfile.FIFOTYPE)}, "w:"),
    "climbing.zip": zip_bytes({"../evil.txt": b"evil"}),
    "absolute.zip": zip_bytes({"/evil.txt": b"evil"}),
    "symlink.zip": zip_bytes({"l": b"/etc/passwd"}, stat.S_IFLNK | 0o777),
}


@pytest.mark.parametrize("name", EVIL)
def test_unsafe_archives_are_refused(run, server, tmp_path, name):
    server.files[name] = EVIL[name]
    code, printed = run(links=[server.link(name)])
    assert code == 1
    assert "unsafe entry" in printed
    assert names(tmp_path) == sorted([f"data/{name}", "mail.txt"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "mail.txt"]


@pytest.mark.parametrize("mode", ["w:", "w:gz", "w:xz"])
def test_damaged_archives_leave_nothing(run, server, mode):
    name = {"w:": "a.tar", "w:gz": "a.tar.gz", "w:xz": "a.tar.xz"}[mode]
    content = tar_bytes(FILES, mode)
    server.files[name] = content[: len(content) // 2]
    code, printed = run(links=[server.link(name)])
    assert code == 1
    assert "cannot be unpacked" in printed
    assert [path.name for path in run.data.iterdir()] == [name]


def test_damaged_or_encrypted_zip(run, server):
    content = bytearray(zip_bytes(FILES))
    content[200] ^= 0xFF  # a wrong checksum inside
    encrypted = bytearray(zip_bytes({"a": b"secret"}))
    for signature in (b"PK\x03\x04", b"PK\x01\x02"):
        encrypted[encrypted.index(signature) + (6 if signature == b"PK\x03\x04" else 8)] |= 1
    for name, bad in (("bad.zip", content), ("encrypted.zip", encrypted)):
        server.files[name] = bytes(bad)
        code, printed = run(links=[server.link(name)])
        assert code == 1
        assert "cannot be unpacked" in printed
    assert names(run.data) == ["bad.zip", "encrypted.zip"]


def test_dangerous_permissions_are_dropped(tmp_path):
    info = tarfile.TarInfo("a.h5")
    info.mode = 0o6777
    (tmp_path / "a.tar").write_bytes(tar_bytes({"a.h5": info}, "w:"))
    script.unpack(tmp_path / "a.tar", tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a/a.h5").stat().st_mode) & 0o7022 == 0


def test_a_single_folder_is_not_nested_but_many_are_kept(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes({"one/x": b"1", "two/x": b"2"}, "w:"))
    script.unpack(tmp_path / "a.tar", tmp_path / "a")
    assert names(tmp_path / "a") == ["one/x", "two/x"]


def test_interruption_is_one_line(run, server, monkeypatch):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "download", interrupt)
    code, printed = run()
    assert code == 1
    assert "interrupted" in printed
