"""What kind of container a file is, by its first bytes, and what its header says that the decoder does not pass on.

FFmpeg opens whatever it recognises, also playlists that name other files, and torchcodec passes on neither the shape of
pixels that a container states nor whether a display matrix mirrors. So a file is looked at here before FFmpeg sees it.
Everything here reads bytes that a stranger wrote: sizes are bounded, and nonsense reads as "not stated".
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

#: Containers that hold their own video and name no other file. In those of `RANDOM_ACCESS` every frame has a time
#: stamp.
CONTAINERS = ("mp4", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg")
RANDOM_ACCESS = frozenset({"mp4", "matroska"})

_HEAD_BYTES = 4096
#: Boxes, elements or chunks that are looked at: of the file, and of one of them.
_MAX_OUTER, _MAX_INNER = 4096, 256
_MP4_FIRST_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp"})
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
#: Bytes after which display orientation is looked for: it stands in the first frame, after at most some user data.
_ORIENTATION_BYTES = 64 * 1024
#: An SEI message of type 47 and 3 bytes (H.264, H.265), at the end of its NAL unit.
_ORIENTATION = re.compile(rb"\x2f\x03([\x00-\x7f][\x00-\xff][\x00-\xff])\x80(?=\x00|\Z)")


@dataclass(frozen=True, slots=True)
class Track:
    """What a container states of one video track.

    Args:
        size_px: Height and width of its frames before any turning; None where the container does not say.
        pixel_aspect: Width of a pixel divided by its height; None where the container does not say.
        mirrored: Whether the display matrix mirrors, besides turning.
    """

    size_px: tuple[int, int] | None = None
    pixel_aspect: float | None = None
    mirrored: bool = False


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a coded picture is made upright: flipped, then turned.

    Args:
        flip_horizontal: Left becomes right.
        flip_vertical: Top becomes bottom.
        quarter_turns: Counter-clockwise, 0 to 3.
    """

    flip_horizontal: bool = False
    flip_vertical: bool = False
    quarter_turns: int = 0


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes of a file say.

    Args:
        container: One of `CONTAINERS`.
        tracks: Video tracks, by the index that FFmpeg gives the stream.
        missing_bytes: How many bytes the container declares that the file does not have.
        declared_bytes: How many bytes the container declares; 0 where it does not say.
        next_file: Where another file of the same kind begins, joined behind the end of this one; 0 if none does. FFmpeg
            shows the first only.
        orientation: What the first frames of an H.264 or H.265 stream ask for, apart from the container; None mostly.
    """

    container: str
    tracks: dict[int, Track] = field(default_factory=dict)
    missing_bytes: int = 0
    declared_bytes: int = 0
    next_file: int = 0
    orientation: Orientation | None = None

    def track(self, index: int) -> Track:
        """The video track of a stream; an empty one where the container is not one that is looked into."""
        if index in self.tracks or len(self.tracks) != 1:
            return self.tracks.get(index, Track())
        return next(iter(self.tracks.values()))


def container_of(head: bytes) -> str | None:
    """The container of a file that starts with `head`; None if it is not one of `CONTAINERS`."""
    # FFmpeg takes a text for a session description (SDP), which names network addresses, by such a line before the
    # first zero byte, however the text starts.
    if b"c=IN" in head.partition(b"\0")[0]:
        return None
    if head[4:8] in _MP4_FIRST_BOXES:
        return "mp4"
    if head.startswith(b"\x1a\x45\xdf\xa3") and (b"matroska" in head[:128] or b"webm" in head[:128]):
        return "matroska"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "avi"
    if head.startswith(b"\x00\x00\x01\xba"):
        return "mpeg"
    for magic, container in ((b"FLV\x01", "flv"), (_ASF, "asf"), (b"OggS\x00", "ogg")):
        if head.startswith(magic):
            return container
    return "mpegts" if _is_transport_stream(head) else None


def described(head: bytes) -> str:
    """What a file that starts with `head` seems to be, for the person who asked for a video."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head.strip(b"\0"):
        return "an empty file" if not head else "zeros"
    if text.startswith((b"#extm3u", b"ffconcat", b"<?xml", b"<mpd", b"<smil", b"[playlist]", b"[reference]", b"v=0")):
        return "a playlist or manifest that names other files, which are never opened"
    for magic, name in ((b"GIF8", "a GIF"), (b"\x89PNG", "a picture"), (b"\xff\xd8\xff", "a picture")):
        if head.startswith(magic):
            return name
    if text.startswith((b"<!doctype", b"<html")):
        return "a web page (a failed download?)"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: `git lfs pull` gets the file"
    return "no video of a known container"


def read_header(file: IO[bytes]) -> Header | None:
    """Reads what `Header` holds; None if the file is not one of `CONTAINERS`. The file must be seekable."""
    size = file.seek(0, 2)
    head = _at(file, 0, _HEAD_BYTES)
    container = container_of(head)
    if container is None:
        return None
    tracks: dict[int, Track] = {}
    declared, media_start = 0, 0
    if container == "mp4":
        tracks, declared, media_start = _read_mp4(file, size)
    elif container == "matroska":
        tracks, declared, media_start = _read_matroska(file, size)
    elif container == "avi":
        tracks = _read_avi(file, size)
        declared = _declared_by_avi(file, head, size)
    elif container == "flv":
        declared = _declared_by_flv(head)
    elif container == "asf":
        tracks = {0: Track(pixel_aspect=_asf_aspect(_at(file, 0, _ORIENTATION_BYTES)))}
    orientation = _orientation(_at(file, media_start, _ORIENTATION_BYTES))
    # Of others FFmpeg reads on into the next.
    follows = container in ("mp4", "flv") and 0 < declared < size
    follows = follows and container_of(_at(file, declared, _HEAD_BYTES)) == container
    return Header(container, tracks, max(0, declared - size), declared, declared if follows else 0, orientation)


def _at(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _is_transport_stream(head: bytes) -> bool:
    for packet_bytes in (188, 192):
        for start in range(min(packet_bytes, len(head))):
            marks = head[start::packet_bytes]
            if len(marks) >= 5 and marks.count(b"G") == len(marks):
                return True
    return False


def _ratio(numerator: float, denominator: float) -> float | None:
    """A pixel's width by its height; None if that is nonsense."""
    if not (numerator > 0 and denominator > 0):
        return None
    ratio = numerator / denominator
    return ratio if 1 / 16 <= ratio <= 16 else None


def _orientation(head: bytes) -> Orientation | None:
    """The display orientation message (H.264 D.1.27, H.265 D.2.17) among the first bytes of a stream."""
    match = _ORIENTATION.search(head)
    if match is None:
        return None
    bits = int.from_bytes(match[1], "big")
    turns = round((bits >> 5 & 0xFFFF) / 0x4000) % 4
    found = Orientation(bool(bits >> 22 & 1), bool(bits >> 21 & 1), turns)
    return found if found != Orientation() else None


# ------------------------------------------------------------------------------------------- MP4, QuickTime (ISO BMFF)


def _boxes(file: IO[bytes], start: int, end: int, most: int = _MAX_INNER) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of the content of each box between two offsets; the last may end after `end`."""
    for _ in range(most):
        head = _at(file, start, 16)
        if start + 8 > end or len(head) < 8:
            return
        size, kind, content = int.from_bytes(head[:4], "big"), head[4:8], start + 8
        if size == 1 and len(head) == 16:
            size, content = int.from_bytes(head[8:], "big"), start + 16
        elif size == 0:  # to the end of the file
            size = end - start
        if size < content - start:
            return
        yield kind, content, start + size
        start += size


def _box(file: IO[bytes], start: int, end: int, *path: bytes) -> tuple[int, int] | None:
    """Where the content of the first box of a path is."""
    for kind, content, stop in _boxes(file, start, end):
        if kind == path[0]:
            return _box(file, content, min(stop, end), *path[1:]) if path[1:] else (content, min(stop, end))
    return None


def _read_mp4(file: IO[bytes], size: int) -> tuple[dict[int, Track], int, int]:
    """Video tracks, the declared size, and where the media starts."""
    tracks: dict[int, Track] = {}
    declared, media_start = 0, 0
    for kind, start, stop in _boxes(file, 0, size, _MAX_OUTER):
        if kind == b"ftyp" and tracks and media_start:
            break  # of another file
        declared = stop
        if kind == b"mdat" and not media_start:
            media_start = start
        if kind == b"moov" and not tracks:
            movie = _matrix(_box_bytes(file, start, stop, b"mvhd"), 36, 48)
            number = -1
            for child, child_start, child_stop in _boxes(file, start, min(stop, size)):
                if child == b"trak":
                    number += 1
                    track = _mp4_track(file, child_start, min(child_stop, size), movie)
                    if track is not None:
                        tracks[number] = track
    return tracks, declared, media_start


def _box_bytes(file: IO[bytes], start: int, stop: int, *path: bytes) -> bytes:
    found = _box(file, start, stop, *path)
    return b"" if found is None else _at(file, found[0], min(found[1] - found[0], 512))


def _matrix(content: bytes, offset: int, offset_version_1: int) -> tuple[float, float, float, float]:
    """a, b, c, d of a transformation matrix: x' = a x + c y, y' = b x + d y."""
    start = offset_version_1 if content[:1] == b"\1" else offset
    if len(content) < start + 20:
        return 1.0, 0.0, 0.0, 1.0
    a, b, _, c, d = struct.unpack_from(">5i", content, start)
    return a / 65536, b / 65536, c / 65536, d / 65536


def _mp4_track(file: IO[bytes], start: int, stop: int, movie: tuple[float, float, float, float]) -> Track | None:
    if _box_bytes(file, start, stop, b"mdia", b"hdlr")[8:12] != b"vide":
        return None
    header = _box_bytes(file, start, stop, b"tkhd")
    a, b, c, d = _matrix(header, 40, 52)
    ma, mb, mc, md = movie
    a, b, c, d = a * ma + b * mc, a * mb + b * md, c * ma + d * mc, c * mb + d * md
    mirrored = a * d - b * c < 0
    sample = _box(file, start, stop, b"mdia", b"minf", b"stbl", b"stsd")
    entry = None if sample is None else next(_boxes(file, sample[0] + 8, sample[1]), None)
    if entry is None:
        return Track(mirrored=mirrored)
    fields = _at(file, entry[1], 28)
    if len(fields) < 28:
        return Track(mirrored=mirrored)
    width, height = struct.unpack_from(">2H", fields, 24)
    aspect: float | None = None
    pixel = _box_bytes(file, entry[1] + 78, entry[2], b"pasp")
    if len(pixel) >= 8:
        aspect = _ratio(*struct.unpack_from(">2I", pixel))
    shown = header[-8:] if len(header) in (84, 96) else b""
    if aspect is None and shown and width and height:
        # QuickTime files without `pasp` say by the track's size how its frames are shown.
        shown_width, shown_height = struct.unpack(">2I", shown)
        aspect = _ratio(shown_width * height, shown_height * width)
        aspect = None if aspect is not None and abs(aspect - 1) < 0.01 else aspect
    across, down = math.hypot(a, c), math.hypot(b, d)
    if across > 0 and down > 0 and abs(across / down - 1) > 0.01:
        aspect = _ratio(across, down)
    return Track((height, width) if height and width else None, aspect, mirrored)


# ----------------------------------------------------------------------------------------------------- Matroska, WebM


def _vint(file: IO[bytes], offset: int, keep_marker: bool) -> tuple[int, int]:
    """An EBML number and where it ends; -1 for an unknown size, -2 for what is no number."""
    head = _at(file, offset, 8)
    if not head or not head[0]:
        return -2, offset
    length = 9 - head[0].bit_length()
    if len(head) < length:
        return -2, offset
    value = int.from_bytes(head[:length], "big")
    if not keep_marker:
        value -= 1 << 7 * length
        if value == (1 << 7 * length) - 1:
            value = -1
    return value, offset + length


def _elements(file: IO[bytes], start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Id, start and end of the content of each element between two offsets."""
    for _ in range(_MAX_INNER):
        if start >= end:
            return
        kind, content = _vint(file, start, keep_marker=True)
        size, content = _vint(file, content, keep_marker=False)
        if kind < 0 or size == -2:
            return
        stop = end if size == -1 else content + size
        yield kind, content, stop
        start = stop


def _read_matroska(file: IO[bytes], size: int) -> tuple[dict[int, Track], int, int]:
    """Video tracks, the declared size, and where the media starts."""
    tracks: dict[int, Track] = {}
    for kind, start, stop in _elements(file, 0, size):
        if kind != 0x18538067:  # Segment
            continue
        for child, child_start, child_stop in _elements(file, start, min(stop, size)):
            if child == 0x1F43B675:  # Cluster: media
                return tracks, stop, child_start
            if child == 0x1654AE6B:  # Tracks
                number = -1
                for entry, entry_start, entry_stop in _elements(file, child_start, min(child_stop, size)):
                    if entry == 0xAE:
                        kind_of_track, track = _matroska_track(file, entry_start, min(entry_stop, size))
                        number += kind_of_track in (1, 2, 17)  # of others FFmpeg makes no stream
                        if kind_of_track == 1:
                            tracks[number] = track
        return tracks, stop, start
    return tracks, 0, 0


def _matroska_track(file: IO[bytes], start: int, stop: int) -> tuple[int, Track]:
    kind, fields = 0, {0x54B2: 0}
    for element, content, end in _elements(file, start, stop):
        if element == 0x83:
            kind = int.from_bytes(_at(file, content, min(end - content, 8)), "big")
        elif element == 0xE0:
            for child, child_content, child_end in _elements(file, content, min(end, stop)):
                fields[child] = int.from_bytes(_at(file, child_content, min(child_end - child_content, 8)), "big")
    width, height = fields.get(0xB0, 0), fields.get(0xBA, 0)
    if not width or not height:
        return kind, Track()
    aspect: float | None = 1.0
    if fields[0x54B2] < 4:  # display size in pixels, centimetres, inches or as a ratio; 4: unknown
        aspect = _ratio(fields.get(0x54B0, width) * height, fields.get(0x54BA, height) * width)
    return kind, Track((height, width), aspect)


# -------------------------------------------------------------------------------------------------------- AVI and ASF


def _chunks(file: IO[bytes], start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name (of a list: its type), start and end of the content of each RIFF chunk between two offsets."""
    for _ in range(_MAX_INNER):
        head = _at(file, start, 12)
        if start + 8 > end or len(head) < 12:
            return
        name, size = head[:4], int.from_bytes(head[4:8], "little")
        is_list = name in (b"LIST", b"RIFF")
        yield head[8:12] if is_list else name, start + (12 if is_list else 8), min(start + 8 + size, end)
        start += 8 + size + size % 2


def _read_avi(file: IO[bytes], size: int) -> dict[int, Track]:
    tracks: dict[int, Track] = {}
    number = -1
    for name, start, stop in _chunks(file, 12, size):
        if name != b"hdrl":
            continue
        for child, child_start, child_stop in _chunks(file, start, stop):
            if child == b"strl":
                number += 1
                chunks = {
                    kind: _at(file, at, min(end - at, 64)) for kind, at, end in _chunks(file, child_start, child_stop)
                }
                if chunks.get(b"strh", b"")[:4] == b"vids":
                    tracks[number] = _avi_track(chunks)
        break
    return tracks


def _declared_by_avi(file: IO[bytes], head: bytes, size: int) -> int:
    """Where the last of the RIFF chunks ends: a large AVI has several; 0 where that was never filled in."""
    first = int.from_bytes(head[4:8], "little")
    if not 0 < first < 2**31:
        return 0
    end = 8 + first
    for _ in range(_MAX_OUTER):
        more = _at(file, end, 12) if end < size else b""
        if more[:4] != b"RIFF" or more[8:12] != b"AVIX":
            break
        end += 8 + int.from_bytes(more[4:8], "little")
    return end


def _avi_track(chunks: dict[bytes, bytes]) -> Track:
    picture, properties = chunks.get(b"strf", b""), chunks.get(b"vprp", b"")
    size, aspect = None, None
    if len(picture) >= 12:
        width, height = struct.unpack_from("<2i", picture, 4)
        size = (abs(height), abs(width)) if width and height else None
    if len(properties) >= 32:
        frame_height, frame_width, width, height = struct.unpack_from("<2H2I", properties, 20)
        aspect = _ratio(frame_width * height, frame_height * width)
    return Track(size, aspect)


def _declared_by_flv(head: bytes) -> int:
    """The size that the file's metadata state; 0 where they do not."""
    _, name, rest = head.partition(b"\0\x08filesize\0")
    stated = struct.unpack(">d", rest[:8])[0] if name and len(rest) >= 8 else 0.0
    return int(stated) if 0 < stated < 2**53 else 0


def _asf_aspect(head: bytes) -> float | None:
    found = []
    for name in ("AspectRatioX", "AspectRatioY"):
        encoded = f"{name}\0".encode("utf-16-le")
        at = head.find(encoded)
        if at < 12:
            return None
        size = int.from_bytes(head[at - 4 : at], "little")
        found.append(int.from_bytes(head[at + len(encoded) : at + len(encoded) + min(size, 4)], "little"))
    return _ratio(*found)
