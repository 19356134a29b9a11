"""Download fastMRI archives with the signed links that NYU mails to everyone who has accepted its agreement.

    python data_scripts/download_fastmri.py --links mail.txt --output data/fastmri --only 'knee_singlecoil*'

Save the mail's text, curl commands and all, as ``mail.txt``. Run the same command again to go on with a download that
was cut off. Each archive is checked, renamed when complete, and unpacked into a folder of its own name. A signed link
opens the data to anyone: only the part before its "?" is ever printed.

Exit codes: 0 all done; 2 the user's mistake (nothing downloaded); 1 something failed (what was finished stays).
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import html
import lzma
import os
import re
import stat
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import requests
import urllib3

from mri_posterior.errors import UserError
from mri_posterior.files import require_free_space

SUFFIXES = (".tar", ".tar.gz", ".tar.xz", ".zip")
LICENCE = """\
fastMRI is NYU's, under the data use agreement you accepted to get these links: use it as agreed, never pass on the
data or the links, and cite fastMRI in what you publish. See https://fastmri.med.nyu.edu"""
ATTEMPTS = 6  # in a row that bring no new byte
TIMEOUT = (10, 60)  # seconds to connect, and between bytes
BROKEN = (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError)
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, RuntimeError, OSError)
Wait = Callable[[float], None]


class DownloadError(Exception):
    """One archive could not be had, through no fault of the user. The text is one line and holds no secret."""


@dataclass(frozen=True)
class Archive:
    """One linked archive; `size` in bytes and `etag` are what the server says of it."""

    name: str
    url: str
    size: int = 0
    etag: str = ""

    @property
    def public_url(self) -> str:
        return self.url.partition("?")[0]

    @property
    def part_name(self) -> str:
        # Bound to this version of the file, so that a later mail's archive is never glued to an earlier one's.
        return f"{self.name}.{hashlib.sha256(f'{self.etag} {self.size}'.encode()).hexdigest()[:8]}.part"

    @property
    def folder(self) -> str:
        return next(self.name.removesuffix(suffix) for suffix in SUFFIXES if self.name.endswith(suffix))


def find_links(text: str, pattern: str = "*") -> list[Archive]:
    """The archives linked in a mail's text whose names fit `pattern`. Raises `UserError` for none, or for namesakes."""
    found: dict[str, Archive] = {}
    for url in re.findall(r"https?://[^\s\"'<>\[\]]+", html.unescape(text)):
        parts = urlsplit(url.rstrip(".,;)"))
        name = PurePosixPath(parts.path).name
        # Plain http would show the secret to the network; on this machine itself there is no network.
        private = parts.scheme == "https" or parts.hostname in ("127.0.0.1", "localhost")
        if not private or not name.endswith(SUFFIXES) or not re.fullmatch(r"\w[\w.-]*", name):
            continue
        archive = Archive(name, parts.geturl())
        if name in found and found[name].public_url != archive.public_url:
            raise UserError(f"--links: two different archives are called {name}: keep the link to one of them")
        found[name] = archive  # a later link to the same archive is the fresher one
    if not found:
        raise UserError("--links: no https links to .tar, .tar.gz, .tar.xz or .zip files: save the text of NYU's mail")
    chosen = [archive for name, archive in found.items() if fnmatch.fnmatch(name, pattern)]
    if not chosen:
        raise UserError(f"--only {pattern}: fits none of {', '.join(found)}: choose another pattern")
    return chosen


def read_checksums(path: Path, archives: list[Archive]) -> dict[str, str]:
    """SHA-256 by archive, from the output of ``sha256sum``. Raises `UserError` if one has none."""
    found = re.findall(r"^\s*([0-9a-fA-F]{64})\s+\*?(\S+)\s*$", path.read_text(errors="replace"), re.MULTILINE)
    checksums = {PurePosixPath(name).name: checksum.lower() for checksum, name in found}
    missing = [archive.name for archive in archives if archive.name not in checksums]
    if missing:
        raise UserError(f"{path}: has no SHA-256 of {', '.join(missing)}: give the output of sha256sum or leave it out")
    return checksums


def tries(archive: Archive, wait: Wait, progress: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Attempt after attempt, waiting twice as long after each that brought nothing new, until they are too many."""
    failures, best = 0, progress()
    while True:
        yield
        failures, best = (0 if progress() > best else failures + 1), max(progress(), best)
        if failures == ATTEMPTS:
            raise DownloadError(f"{archive.public_url}: the connection keeps failing: run the same command again later")
        wait(2.0**failures)


def get(session: requests.Session, archive: Archive, headers: dict[str, str]) -> requests.Response | None:
    """The server's answer, for the caller to close, or None where another try may help."""
    # The bytes must come as they are stored, or their count would not be the file's.
    headers = {"Accept-Encoding": "identity"} | headers
    try:
        answer = session.get(archive.url, headers=headers, stream=True, timeout=TIMEOUT, allow_redirects=False)
    except requests.RequestException:  # not shown: its text holds the signed link
        return None
    if answer.status_code in (200, 206):
        return answer
    answer.close()
    if answer.status_code == 429 or answer.status_code >= 500:
        return None
    if answer.status_code == 403:
        raise UserError(f"{archive.public_url}: the link has expired or is incomplete (403): ask NYU for a new mail")
    raise UserError(f"{archive.public_url}: the server answers {answer.status_code}: check the link")


def look_up(session: requests.Session, archive: Archive, wait: Wait) -> Archive:
    """The archive with its size. Asks for one byte, since the signature is for GET and S3 refuses it for HEAD.

    Raises `UserError` if the link has expired or leads nowhere, `DownloadError` if the server cannot be reached.
    """
    for _ in tries(archive, wait):
        answer = get(session, archive, {"Range": "bytes=0-0"})
        if answer is not None:
            answer.close()
            field = "Content-Range" if answer.status_code == 206 else "Content-Length"
            total = answer.headers.get(field, "").rpartition("/")[2]
            if total.isdecimal():
                return replace(archive, size=int(total), etag=answer.headers.get("ETag", ""))
    raise AssertionError("tries() ends by raising")


def download(session: requests.Session, archive: Archive, folder: Path, checksum: str | None, wait: Wait) -> None:
    """Fetch what is still missing of an archive, check it, and give it its name.

    Raises `UserError` if the link has expired, `DownloadError` if the server keeps failing or the SHA-256 is wrong.
    """
    part = folder / archive.part_name
    part.touch()
    for _ in tries(archive, wait, lambda: os.path.getsize(part)):
        if os.path.getsize(part) != archive.size:
            fetch(session, archive, part)
        if os.path.getsize(part) == archive.size:
            break
    if checksum is not None and digest(part) != checksum:
        part.unlink()
        raise DownloadError(f"{archive.name}: its SHA-256 is not the expected one: removed, download it again")
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, folder / archive.name)


def fetch(session: requests.Session, archive: Archive, part: Path) -> None:
    """One attempt to complete `part`; comes back early when the connection breaks."""
    have = os.path.getsize(part)
    missing = {"Range": f"bytes={have}-"} | ({"If-Range": archive.etag} if archive.etag else {})
    answer = get(session, archive, missing if 0 < have < archive.size else {})
    if answer is None:
        return
    resumed = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    with answer, open(part, "ab" if resumed else "wb") as file, suppress(*BROKEN):
        for chunk in answer.raw.stream(2**20, decode_content=False):
            file.write(chunk)
            if file.tell() > archive.size:
                break
            if sys.stderr.isatty():
                print(f"{archive.name}: {file.tell() / archive.size:.1%}", end="\r", file=sys.stderr)


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def members(archive: Path) -> Iterator[tuple[str, bool, Callable[[Path], object]]]:
    """Name, whether it is a plain file or folder, and how to extract it, for everything in a tar or zip."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
                yield info.filename, plain, lambda folder, info=info: zipped.extract(info, folder)
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                plain = member.isreg() or member.isdir()
                yield member.name, plain, lambda folder, member=member: tar.extract(member, folder, filter="data")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack into `folder`, whole or not at all; a single top folder inside the archive becomes `folder` itself.

    Raises `DownloadError` if the archive is damaged or holds a link, a device or a path that leads outside.
    """
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        content = Path(temporary) / "content"
        content.mkdir()
        try:
            for name, plain, extract in members(archive):
                if not plain or name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
                    raise DownloadError(f"{archive}: holds the unsafe entry {name!r}: nothing was unpacked, delete it")
                extract(content)
            top = list(content.iterdir())
            (top[0] if len(top) == 1 and top[0].is_dir() else content).rename(folder)
        except DAMAGED as error:
            raise DownloadError(f"{archive}: cannot be unpacked ({error}): download it again") from None


def plan(archives: list[Archive], args: argparse.Namespace) -> None:
    """Say what would be done, and refuse what cannot end well, before a byte is written."""
    needed = 0
    for archive in archives:
        path, part = args.output / archive.name, args.output / archive.part_name
        here = next((os.path.getsize(file) for file in (path, part) if file.exists()), 0)
        if path.exists() and here != archive.size:
            raise UserError(f"{path}: is there with another size than the link's: move it away")
        needed += max(archive.size - here, 0)
        # k-space hardly compresses: unpacked it takes about as much again.
        needed += archive.size if args.unpack and not (args.output / archive.folder).exists() else 0
        print(f"{archive.name}: {archive.size / 1e6:,.1f} MB, {here / 1e6:,.1f} MB of it here")
    require_free_space(args.output, needed)
    print(f"{needed / 1e6:,.1f} MB of disk needed in {args.output}\n{LICENCE}")


def run(args: argparse.Namespace, wait: Wait) -> int:
    archives, failed = find_links(args.links.read_text(errors="replace"), args.only), 0
    checksums = read_checksums(args.sha256, archives) if args.sha256 else {}
    with requests.Session() as session:
        if not (args.verify and checksums):  # checksums can be held to without the server
            archives = [look_up(session, archive, wait) for archive in archives]
        if not args.verify:
            plan(archives, args)
            print("" if args.yes else "Download? [y/N] ", end="", flush=True)
            if not args.yes and sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise UserError("nothing downloaded: answer y, or add --yes to download without asking")
            args.output.mkdir(parents=True, exist_ok=True)
        for archive in archives:
            path, checksum = args.output / archive.name, checksums.get(archive.name)
            try:
                if not args.verify and not path.exists():
                    download(session, archive, args.output, checksum, wait)
                else:
                    actual, expected = (digest, checksum) if checksum else (os.path.getsize, archive.size)
                    if not path.is_file() or actual(path) != expected:
                        raise DownloadError(f"{path}: is missing or damaged: delete it and download it again")
                if args.unpack and not args.verify and not (args.output / archive.folder).exists():
                    unpack(path, args.output / archive.folder)
                print(f"{archive.name}: ok")
            except (UserError, DownloadError, OSError) as error:
                print(f"failed: {error}", file=sys.stderr)
                failed = 1
    return failed


def main(argv: Sequence[str] | None = None, wait: Wait = time.sleep) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--links", type=Path, required=True, help="the text of NYU's mail with the signed links")
    parser.add_argument("--output", type=Path, required=True, help="folder for the archives and what is in them")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="archives to take, such as 'knee_singlecoil*'")
    parser.add_argument("--sha256", type=Path, help="checksums to hold the archives to, as sha256sum prints them")
    parser.add_argument("--unpack", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--verify", action="store_true", help="only check the archives that are here")
    parser.add_argument("--yes", action="store_true", help="download without asking")
    try:
        return run(parser.parse_args(argv), wait)
    except UserError as error:
        problem, code = f"error: {error}", 2
    except OSError as error:  # only from what the options name, and before anything is downloaded
        problem, code = f"error: {error.filename}: {error.strerror}: check the path", 2
    except (DownloadError, KeyboardInterrupt) as error:
        problem, code = f"failed: {str(error) or 'interrupted: run the same command to go on'}", 1
    print(problem, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
