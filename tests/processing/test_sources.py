import base64
import os
import socket
from pathlib import Path

import pytest

from mmllm.errors import MediaError
from mmllm.processing.sources import DECODER_VERSION, Limits, content_key, read_media

LIMITS = Limits(max_bytes=1000)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder with one good file, and a secret beside the folder."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "images" / "a.png").write_bytes(b"good")
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (tmp_path / "data-other").mkdir()
    (tmp_path / "data-other" / "b.png").write_bytes(b"secret")
    return root


@pytest.mark.parametrize("source", ["images/a.png", "./images/a.png", "images//a.png", Path("images/a.png")])
def test_a_contained_path_is_read(root: Path, source: str | Path) -> None:
    assert read_media(source, root=root, limits=LIMITS) == b"good"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("../secret.txt", r"'\.\.'"),
        ("images/../../secret.txt", r"'\.\.'"),
        ("images/../images/a.png", r"'\.\.'"),
        ("..", r"'\.\.'"),
        ("../data-other/b.png", r"'\.\.'"),
        ("/etc/passwd", "absolute"),
        ("//etc/passwd", "absolute"),
        (Path("/etc/passwd"), "absolute"),
        ("images/a.png\0.jpg", "NUL"),
        ("%2e%2e/secret.txt", "no such file"),
        ("%2e%2e%2fsecret.txt", "no such file"),
        ("%252e%252e/secret.txt", "no such file"),
        ("..%2fsecret.txt", "no such file"),
        ("．．/secret.txt", "no such file"),
        ("file:///etc/passwd", "file: URLs"),
        ("file://localhost/etc/passwd", "file: URLs"),
        ("file:/etc/passwd", "file: URLs"),
        ("FILE:///etc/passwd", "file: URLs"),
        ("ftp://host/a.png", "ftp: URLs"),
        ("s3://bucket/a.png", "s3: URLs"),
        ("C:\\secret.txt", "absolute"),
        ("C:/secret.txt", "absolute"),
        ("C:secret.txt", "absolute"),
        ("\\\\server\\share\\a.png", "absolute"),
        ("..\\secret.txt", "backslash"),
        ("images\\a.png", "backslash"),
        ("", "empty"),
        (".", "folder"),
        ("images", "folder"),
        ("images/a.png/b", "no such file"),
        ("absent.png", "no such file"),
        ("x" * 5000, "no such file"),
        ("\ud800.png", "not a file name"),
        ("~/a.png", "no such file"),
    ],
)
def test_a_path_that_is_not_in_the_folder_is_refused(root: Path, source: str | Path, reason: str) -> None:
    with pytest.raises(MediaError, match=reason) as caught:
        read_media(source, root=root, limits=LIMITS)
    assert len(str(caught.value)) < 300
    assert str(root) not in str(caught.value)  # where the data lie is not the sender's business


def test_symbolic_links_are_followed_inside_the_folder_only(root: Path, tmp_path: Path) -> None:
    (root / "in.png").symlink_to(root / "images" / "a.png")
    (root / "out.png").symlink_to(tmp_path / "secret.txt")
    (root / "out").symlink_to(tmp_path)
    (root / "sibling").symlink_to(tmp_path / "data-other")  # its name starts like the folder's
    (root / "loop").symlink_to(root / "loop")
    assert read_media("in.png", root=root, limits=LIMITS) == b"good"
    for source in ("out.png", "out/secret.txt", "sibling/b.png"):
        with pytest.raises(MediaError, match="symbolic link"):
            read_media(source, root=root, limits=LIMITS)
    with pytest.raises(MediaError, match="no such file"):
        read_media("loop", root=root, limits=LIMITS)


def test_the_folder_itself_may_be_reached_through_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert read_media("images/a.png", root=tmp_path / "link", limits=LIMITS) == b"good"


def test_only_regular_files_are_opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(root / "pipe")
    with pytest.raises(MediaError, match="named pipe"):
        read_media("pipe", root=root, limits=LIMITS)
    monkeypatch.chdir(root)  # the path of a socket is limited to about 100 characters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(MediaError, match="socket"):
            read_media("socket", root=root, limits=LIMITS)
    for source, reason in ((Path("/dev/zero"), "device"), (root / "pipe", "named pipe"), (root, "folder")):
        with pytest.raises(MediaError, match=reason):
            read_media(source, root=None, limits=LIMITS)


def test_the_callers_own_paths_need_no_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root / "images")
    assert read_media(str(root / "images" / "a.png"), root=None, limits=LIMITS) == b"good"
    assert read_media("a.png", root=None, limits=LIMITS) == b"good"
    assert read_media("../../secret.txt", root=None, limits=LIMITS) == b"secret"
    with pytest.raises(MediaError, match="No such file"):
        read_media("absent.png", root=None, limits=LIMITS)
    with pytest.raises(MediaError, match="NUL"):
        read_media("a\0.png", root=None, limits=LIMITS)


@pytest.mark.parametrize("root_given", [True, False])
@pytest.mark.parametrize("source", ["http://127.0.0.1/a.png", "https://example.org/a.png", "HTTP://[::1]/a", "http:a"])
def test_urls_are_not_fetched(root: Path, root_given: bool, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(MediaError, match="URLs are not fetched; download the file"):
        read_media(source, root=root if root_given else None, limits=LIMITS)


def test_a_colon_in_a_file_name_is_not_a_scheme(root: Path) -> None:
    (root / "shot 12:30.png").write_bytes(b"good")
    assert read_media("shot 12:30.png", root=root, limits=LIMITS) == b"good"


def test_the_byte_limit_holds_for_every_source(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, over = b"x" * 1000, b"x" * 1001
    (root / "exact").write_bytes(exact)
    (root / "over").write_bytes(over)
    for data in (exact, over):
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        for source, folder in ((data, None), (url, None), ("exact" if data is exact else "over", root)):
            if data is exact:
                assert read_media(source, root=folder, limits=LIMITS) == data
            else:
                with pytest.raises(MediaError, match="1,001 bytes, the limit is 1,000"):
                    read_media(source, root=folder, limits=LIMITS)
    # A sparse file of a terabyte is judged by its size; nothing is read.
    with (root / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(Path, "open", None)
    with pytest.raises(MediaError, match="1,099,511,627,776 bytes"):
        read_media("sparse", root=root, limits=LIMITS)


def test_files_that_report_no_size_are_limited_too() -> None:
    source = Path("/proc/self/smaps")  # a regular file of size 0 that holds far more than 1000 bytes
    if not source.exists():
        pytest.skip("no /proc")
    with pytest.raises(MediaError, match="the limit is 1,000"):
        read_media(source, root=None, limits=LIMITS)


def test_the_base64_of_an_oversized_data_url_is_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base64, "b64decode", None)
    with pytest.raises(MediaError, match="the limit is 1,000"):
        read_media("data:image/png;base64," + "A" * 1400, root=None, limits=LIMITS)


@pytest.mark.parametrize("prefix", ["data:image/png;base64,", "DATA:;BASE64,", "data:text/html;charset=utf-8;base64,"])
def test_data_urls_are_decoded(prefix: str) -> None:
    data = bytes(range(256))
    assert read_media(prefix + base64.b64encode(data).decode(), root=None, limits=LIMITS) == data


@pytest.mark.parametrize(
    "url", ["data:image/png,abc", "data:", "data:image/png;base64", "data:a;base64,@@@@", "data:a;base64,AAA"]
)
def test_malformed_data_urls_are_refused(url: str) -> None:
    with pytest.raises(MediaError, match="data URL"):
        read_media(url, root=None, limits=LIMITS)


def test_an_unreadable_file_is_a_media_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MediaError, match="Permission denied"):
        read_media("images/a.png", root=root, limits=LIMITS)


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_pixels": -1}, {"max_seconds": float("nan")}])
def test_limits_are_positive(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be greater than 0"):
        Limits(**limits)  # type: ignore[arg-type]


def test_content_keys_keep_media_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    key = content_key(b"abc", "image")
    assert key == content_key(b"abc", "image")
    assert len(key) == 64
    others = [
        content_key(b"abd", "image"),
        content_key(b"abc", "audio"),
        content_key(b"", "image"),
        content_key(b"c", "imageab"),
    ]
    monkeypatch.setattr("mmllm.processing.sources.DECODER_VERSION", DECODER_VERSION + 1)
    others.append(content_key(b"abc", "image"))
    assert len({key, *others}) == 6
