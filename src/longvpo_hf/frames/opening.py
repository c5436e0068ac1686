"""The one door through which a video file is opened: local files and `hf://` addresses, of containers that are known.

FFmpeg itself would open any URL, any protocol in front of a name (`concat:x.mp4`, `pipe:0.mp4`) and any playlist. Here
a name is only ever a file's, and the file's first bytes decide whether FFmpeg sees it at all.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any, Literal

from longvpo_hf.errors import ConfigError, VideoError, check_machine
from longvpo_hf.frames.headers import CONTAINERS, Header, described, read_header
from longvpo_hf.timeline import Clip

Reason = Literal[
    "missing_file",
    "unreadable",
    "beyond_end",
    "before_begin",
    "untimed",
    "too_many_pixels",
    "stretched",
    "unreachable",
]

#: File names ending so are given to FFmpeg by name; others as bytes, since FFmpeg reads meaning from some
#: (`x%03d.png`).
_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv", ""}
)
#: What FFmpeg's commonest error codes mean.
_FFMPEG_SAID = {-1094995529: "Invalid data found when processing input", -1163346256: "not implemented in FFmpeg"}


class UnreadableVideo(VideoError):
    """A clip, or a whole file, whose frames cannot be had.

    Args:
        reason: `missing_file`; `unreadable`: no video, truncated or corrupted; `beyond_end`, `before_begin`: the clip
            is not within the file; `untimed`: frames without usable time stamps; `too_many_pixels`, `stretched`: the
            file passes one of `Bounds`; `unreachable`: a remote file was not answered in time.
        clip: The clip, or the path of the file.
        detail: What the decoder said, or the bound that was passed.
    """

    def __init__(self, reason: Reason, clip: Clip | str, detail: str) -> None:
        self.reason = reason
        self.clip = clip
        self.detail = detail
        self.path = clip if isinstance(clip, str) else clip.path
        span = "" if isinstance(clip, str) else f" [{clip.start_seconds}, {clip.end_seconds}) s"
        super().__init__(f"{reason}: {self.path}{span}: {detail}")

    def __reduce__(self) -> tuple[type[UnreadableVideo], tuple[Reason, Clip | str, str]]:
        """Lets the error leave a dataloader worker unchanged."""
        return type(self), (self.reason, self.clip, self.detail)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a file may ask of the machine that decodes it.

    Args:
        max_frame_px: Pixels of a frame, height × width; 2²⁵ is just above 8K UHD. Larger ones are not decoded.
        max_frame_seconds: How long one frame may be shown. A file can declare hours for three frames; scenes and clips
            would be cut of them. Lectures that show one slide for long need a higher bound.
    """

    max_frame_px: int = 2**25
    max_frame_seconds: float = 1800.0

    def __post_init__(self) -> None:
        if self.max_frame_px < 1 or not self.max_frame_seconds > 0:
            raise ConfigError(
                "A frame must be allowed a pixel and an instant, got "
                f"max_frame_px={self.max_frame_px}, max_frame_seconds={self.max_frame_seconds}."
            )


def need_ffmpeg() -> None:
    """Raises VideoError if FFmpeg's shared libraries, which decode and encode, are not on this machine."""
    import torchcodec

    if torchcodec.ffmpeg_major_version is None:
        raise VideoError(
            "FFmpeg's shared libraries, version 4 to 9, are missing or do not load, so no video can be read. Install "
            "them: apt-get install ffmpeg (Debian, Ubuntu), dnf install ffmpeg-free (Fedora), brew install ffmpeg "
            "(macOS) or conda install -c conda-forge ffmpeg."
        )


def is_whole(path: Path) -> bool:
    """Whether a file is there, of a known container, and no shorter than that declares."""
    try:
        with path.open("rb") as file:
            header = read_header(file)
    except OSError:
        return False
    return header is not None and not header.missing_bytes


def decoder() -> str:
    """What decodes here, with its version: frames of a damaged file may differ from one to another."""
    import torchcodec

    return f"torchcodec {torchcodec.__version__}, FFmpeg {torchcodec.ffmpeg_major_version}"


class Source:
    """A video file of a known container, for FFmpeg to read.

    Args:
        path: A local path or an `hf://` address.

    Attributes:
        header: What its first bytes say.

    Raises:
        UnreadableVideo: If it is missing, not reached, or of no known container.
        VideoError: If FFmpeg is missing.
    """

    def __init__(self, path: str) -> None:
        need_ffmpeg()
        self.path = path
        self._is_remote = path.startswith("hf://")
        with self.reading(), self._open() as file:
            header = read_header(file)
            if header is None:
                file.seek(0)
                raise UnreadableVideo(
                    "unreadable",
                    path,
                    f"it is {described(file.read(4096))}, by its first bytes; opened are {', '.join(CONTAINERS)}",
                )
        self.header: Header = header

    def for_ffmpeg(self) -> Any:
        """What FFmpeg is given: a file by its full name behind `file:`, or something to read bytes from.

        Of MP4 files that are joined behind each other, the first: in one of fragments FFmpeg reads on, takes the next
        one's frames for the first one's, and shows the last picture in their place.
        """
        if self.header.next_file and self.header.container == "mp4":
            return _First(self._open(), self.header.next_file)
        if self._is_remote or PurePath(self.path).suffix.lower() not in _SUFFIXES:
            return self._open()
        full = os.path.abspath(self.path)
        try:
            full.encode()
        except UnicodeEncodeError:  # a name that is not UTF-8
            return self._open()
        return f"file:{full}"

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Makes an `UnreadableVideo` of whatever the decoder, the file system or the Hub says in the block.

        Raises:
            StorageError: If the machine is short of something, such as open files.
        """
        try:
            yield
        except UnreadableVideo:
            raise
        except FileNotFoundError as error:
            where = " on the Hub" if self._is_remote else ""
            raise UnreadableVideo("missing_file", self.path, f"no such file{where}") from error
        except (RuntimeError, IndexError, ValueError) as error:
            check_machine(error)
            raise UnreadableVideo("unreadable", self.path, said(error)) from error
        except OSError as error:
            check_machine(error)
            reason: Reason = "unreachable" if self._is_remote else "unreadable"
            raise UnreadableVideo(reason, self.path, said(error)) from error
        except Exception as error:
            # Broad, because the errors of what huggingface_hub speaks HTTP with are told by their module: importing it
            # would take longer than opening a file. All others, and those of a local file, are raised as they are.
            if not self._is_remote or not type(error).__module__.startswith("httpx2"):
                raise
            raise UnreadableVideo("unreachable", self.path, said(error)) from error

    def _open(self) -> IO[bytes]:
        if self._is_remote:  # rows streamed from the Hub; each of its reads has a timeout (HF_HUB_DOWNLOAD_TIMEOUT)
            from huggingface_hub import HfFileSystem

            return HfFileSystem().open(self.path, "rb")
        if not os.path.isfile(self.path):
            is_url = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", self.path)
            remedy = ": of URLs only hf:// addresses are opened; download it first" if is_url else ""
            raise UnreadableVideo("missing_file", self.path, f"no such file{remedy}")
        return open(self.path, "rb")


class _First(io.RawIOBase):
    """The first bytes of a file."""

    def __init__(self, file: IO[bytes], num_bytes: int) -> None:
        self._file = file
        self._num_bytes = num_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._num_bytes - self._file.tell())
        return self._file.read(left if size < 0 else min(size, left))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            offset, whence = offset + self._num_bytes, os.SEEK_SET
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def said(error: Exception) -> str:
    """What the decoder said, without its own source lines ("Class, /path/file.cpp:41, ") and pleas to report it."""
    text = str(error).strip()
    if "best video stream is unknown" in text or "No valid video stream" in text:
        return "the file has no video stream"
    if "Could not seek file" in text:
        return "FFmpeg cannot seek in its video stream, as in a cover's picture beside nothing but sound"
    if match := re.search(r"\(status (-\d+)\)", text):
        return f"a packet cannot be decoded: {_FFMPEG_SAID.get(int(match[1]), f'FFmpeg gives {match[1]}')}"
    return re.sub(r"^\w+, \S+:\d+, ", "", text.splitlines()[0] if text else type(error).__name__)
