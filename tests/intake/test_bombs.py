"""Small files that would take all memory: each ends as a named drop, in bounded memory and time.

One process per kind, forked from one that has imported all that is needed: what it takes beyond that is the bomb's.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import psutil
import pytest

MIB = 1024**2
#: What each bomb would take where nothing bounds it, and less than which it must take.
BOMB_BYTES = 120 * MIB
BOUND_BYTES = 80 * MIB
ROW_BYTES = 16 * MIB
#: What unpacks to less than 256 MiB is never too much.
LARGE_BYTES = 300 * MIB
#: Python's objects take more than the text of a record that is as long as it may be; of Parquet some rows are held.
OTHER_BOUND_BYTES = {"json_that_grows": 500 * MIB, "parquet_dictionary": 150 * MIB}
#: A bomb that is read in time, not in memory.
SECONDS = 60


def sparse(path: Path, start: bytes, end: bytes = b"", num_bytes: int = BOMB_BYTES) -> None:
    """A file of zeros between a start and an end; it takes no room on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + num_bytes)
        file.seek(0, 2)
        file.write(end)


def gzipped_tar(path: Path, headers: bytes, filling: bytes = b"\0", num_bytes: int = BOMB_BYTES) -> None:
    """A tar.gz of headers and then the same bytes again and again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    block = filling * (MIB // len(filling))
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(headers)
        for _ in range(num_bytes // MIB):
            file.write(block)


def header(name: str, num_bytes: int, kind: bytes = tarfile.REGTYPE, pax: dict[str, str] | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = num_bytes, kind
    if pax:
        info.pax_headers = pax
        return info.tobuf(tarfile.PAX_FORMAT)
    return info.tobuf(tarfile.GNU_FORMAT)


def llava(root: Path, name: str = "a.mp4") -> None:
    turns = [{"from": "gpt", "value": "c"}]
    root.mkdir(parents=True, exist_ok=True)
    (root / "x_cap.json").write_text(json.dumps([{"id": "i", "video": name, "conversations": turns}]))


# ------------------------------------------------------------------------------------------------------- bombs, by kind


def json_line(root: Path) -> tuple[str, str]:
    sparse(root / "x_cap.jsonl", b'{"id": "', b'"}\n{"id": 1}\n')
    return "llava-video", "bad_record"


def json_string(root: Path) -> tuple[str, str]:
    sparse(root / "x_cap.json", b'[{"id": "', b'"}]')
    return "llava-video", "bad_record"


def json_that_grows(root: Path) -> tuple[str, str]:
    """As long as a record may be; empty lists take twenty times their text."""
    root.mkdir()
    (root / "x_cap.jsonl").write_text('{"id": [' + ",".join(["[]"] * (5 * MIB)) + "]}")
    return "llava-video", "bad_record"


def json_nested(root: Path) -> tuple[str, str]:
    root.mkdir()
    (root / "x_cap.json").write_text("[" * (20 * MIB))
    return "llava-video", "bad_record"


def csv_field(root: Path) -> tuple[str, str]:
    sparse(root / "dataset.csv", b'video\n"', b'"\n')
    return "longva-tpo", "bad_record"


def csv_of_many_lines(root: Path) -> tuple[str, str]:
    root.mkdir()
    with (root / "dataset.csv").open("w") as file:
        file.write("video\n")
        for _ in range(60):
            file.write(('"' + "y" * 1000 + '\n",') * 1000)  # one row: each of its fields goes over to the next line
    return "longva-tpo", "bad_record"


def parquet_value(root: Path, num_bytes: int = LARGE_BYTES) -> tuple[str, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    path = root / "a.parquet"
    with pq.ParquetWriter(path, pa.schema([("mp4", pa.binary()), ("json", pa.string())]), compression="zstd") as writer:
        writer.write_table(pa.table({"mp4": [bytes(num_bytes)], "json": ["x"]}, schema=writer.schema))
    assert path.stat().st_size < MIB
    return "finevideo", "bad_record"


def parquet_list(root: Path, num_members: int = LARGE_BYTES // 16) -> tuple[str, str]:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    numbers = pa.array(np.zeros(num_members, np.int64))
    rows = pa.ListArray.from_arrays(pa.array([0, len(numbers)], pa.int32()), numbers)
    pq.write_table(pa.table({"json": rows}), root / "a.parquet")
    assert (root / "a.parquet").stat().st_size < MIB
    return "finevideo", "bad_record"


def parquet_dictionary(root: Path) -> tuple[str, str]:
    """One long value, many times: stored once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    once = pa.array(["x" * (MIB // 2)])
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), once)
    pq.write_table(pa.table({"file_name": values, "caption": values}), root / "metadata.parquet")
    (root / "a.mp4").write_bytes(b"a")
    assert (root / "metadata.parquet").stat().st_size < MIB
    return "videofolder", "bad_record"


def parquet_index(root: Path) -> tuple[str, str]:
    sparse(root / "a.parquet", b"PAR1", struct.pack("<I", BOMB_BYTES) + b"PAR1")
    return "finevideo", "bad_record"


def _lie(path: Path, true: int, false: int) -> None:
    """Changes a number wherever it is in the index of a Parquet file; the length of the index stays the same."""
    content = bytearray(path.read_bytes())
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    old, new = _varint(true), bytearray(_varint(false))
    while len(new) < len(old):
        new[-1] |= 128
        new.append(0)
    assert old in content[start:-8]
    path.write_bytes(content[:start] + content[start:-8].replace(old, new) + content[-8:])


def _varint(number: int) -> bytes:
    """A number as Thrift's compact protocol writes it."""
    number, out = 2 * number, bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def parquet_lying_bytes(root: Path) -> tuple[str, str]:
    """A value of which the index says that it is small."""
    parquet_value(root, BOMB_BYTES)
    import pyarrow.parquet as pq

    _lie(root / "a.parquet", pq.read_metadata(root / "a.parquet").row_group(0).column(0).total_uncompressed_size, 1000)
    return "finevideo", "bad_record"


def parquet_lying_members(root: Path) -> tuple[str, str]:
    """A list of which the index says that it has one member."""
    parquet_list(root, BOMB_BYTES // 8)
    import pyarrow.parquet as pq

    _lie(root / "a.parquet", pq.read_metadata(root / "a.parquet").row_group(0).column(0).num_values, 1)
    return "finevideo", "bad_record"


def parquet_member(root: Path) -> tuple[str, str]:
    """A list of 100,000 times the same text, which is in the file once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    members = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * (MIB // 2)]))
    rows = pa.ListArray.from_arrays(pa.array([0, len(members)], pa.int32()), members)
    pq.write_table(pa.table({"json": rows}), root / "a.parquet")
    return "finevideo", "bad_record"


def parquet_rows(root: Path) -> tuple[str, str]:
    """Rows that take no room."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    pq.write_table(pa.table({"json": pa.nulls(4_000_000, pa.int8())}), root / "a.parquet", row_group_size=4_000_000)
    return "finevideo", "bad_record"


def zip_member(root: Path) -> tuple[str, str]:
    llava(root)
    with zipfile.ZipFile(root / "x.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a.mp4", bytes(BOMB_BYTES))
    return "llava-video", "too_large"


def zip_record(root: Path) -> tuple[str, str]:
    root.mkdir()
    with zipfile.ZipFile(root / "captions.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("v_caption.json", b" " * BOMB_BYTES)
    return "vript", "bad_record"


def zip_index(root: Path) -> tuple[str, str]:
    llava(root)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, BOMB_BYTES, 0, 0)
    sparse(root / "x.zip", b"", end)
    return "llava-video", "damaged_archive"


def tar_total(root: Path) -> tuple[str, str]:
    llava(root)
    gzipped_tar(root / "x.tar.gz", header("a.txt", LARGE_BYTES), num_bytes=LARGE_BYTES)
    return "llava-video", "damaged_archive"


def tar_name(root: Path) -> tuple[str, str]:
    llava(root)
    gzipped_tar(root / "x.tar.gz", header("././@LongLink", BOMB_BYTES, tarfile.GNUTYPE_LONGNAME))
    return "llava-video", "damaged_archive"


def tar_pax(root: Path) -> tuple[str, str]:
    llava(root)
    gzipped_tar(root / "x.tar.gz", header("pax", BOMB_BYTES, tarfile.XHDTYPE))
    return "llava-video", "damaged_archive"


def tar_sparse_map(root: Path) -> tuple[str, str]:
    """A map of holes that does not end."""
    llava(root)
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.mp4", "GNU.sparse.realsize": "9"}
    gzipped_tar(root / "x.tar.gz", header("a.mp4", BOMB_BYTES, pax=pax) + b"9" * 10 + b"\n", b"1\n")
    return "llava-video", "damaged_archive"


def tar_claims(root: Path) -> tuple[str, str]:
    """A size of 2**62 bytes, of which none are there: tarfile would go on reading them."""
    llava(root)
    (root / "x.tar").write_bytes(header("b.txt", 2**62) + bytes(1024))
    return "llava-video", "damaged_archive"


def tar_hole(root: Path) -> tuple[str, str]:
    """A sparse file, whose holes would become zeros."""
    llava(root)
    info = bytearray(header("a.mp4", 0, tarfile.GNUTYPE_SPARSE))
    info[483:495] = b"%011o\0" % (BOMB_BYTES * 10)  # its real size
    info[148:156] = b"%06o\0 " % (sum(info[:148]) + 8 * 32 + sum(info[156:512]))
    (root / "x.tar").write_bytes(bytes(info) + bytes(1024))
    return "llava-video", "outside_root"


def tar_record(root: Path) -> tuple[str, str]:
    root.mkdir()
    with tarfile.open(root / "x.tar", "w") as tar:
        for name, size in (("a.mp4", 1), ("a.json", 60 * MIB)):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(b" " * size))
    return "pe-video", "bad_record"


BOMBS: tuple[Callable[[Path], tuple[str, str]], ...] = (
    *(json_line, json_string, json_that_grows, json_nested, csv_field, csv_of_many_lines),
    *(parquet_value, parquet_list, parquet_dictionary, parquet_index),
    *(parquet_lying_bytes, parquet_lying_members, parquet_member, parquet_rows, zip_member, zip_record, zip_index),
    *(tar_total, tar_name, tar_pax, tar_sparse_map, tar_claims, tar_hole, tar_record),
)

# --------------------------------------------------------------------------------------------------- running into them


def defuse(bomb: str, corpus: str, root: Path) -> dict[str, object]:
    """In a process of its own: the reasons of what is dropped, and the memory and disk that reading takes."""
    from longvpo_hf.funnel import Dropped
    from longvpo_hf.intake import IntakeLimits, read_corpus

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limits = IntakeLimits(max_video_bytes=80 * MIB, max_row_bytes=ROW_BYTES)
    reasons, error = set(), ""
    children = threading.Thread(target=watch_children, daemon=True)
    children.start()
    try:
        for item in read_corpus(corpus, root, root.parent / "cache", limits):
            reasons.add(item.reason if isinstance(item, Dropped) else "source")
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"[:500]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    disk = sum(path.stat().st_size for path in (root.parent / "cache").rglob("*") if path.is_file())
    found = {"reasons": sorted(reasons), "error": error, "kib": peak - before, "disk": disk}
    return {"bomb": bomb, **found, "children": max(CHILDREN, default=0)}


#: What processes that a reader started were seen to hold.
CHILDREN: list[int] = []


def watch_children() -> None:
    while True:
        for process in psutil.Process().children():
            with suppress(psutil.Error):
                CHILDREN.append(process.memory_info().rss)
        time.sleep(0.01)


def main(folder: Path) -> None:
    """Makes each bomb and reads it, in a forked process; prints one JSON line for each."""
    for name in ("llava_video", "vript", "pe_video", "finevideo", "videofolder", "longva_tpo"):
        import_module(f"longvpo_hf.intake.corpora.{name}")
    for bomb in BOMBS:
        root = folder / bomb.__name__ / "root"
        root.parent.mkdir()
        if (maker := os.fork()) == 0:
            corpus, reason = bomb(root)
            (root.parent / "corpus").write_text(f"{corpus} {reason}")
            os._exit(0)
        assert os.waitpid(maker, 0)[1] == 0, bomb.__name__
        corpus, reason = (root.parent / "corpus").read_text().split()
        sys.stdout.flush()
        if (reader := os.fork()) == 0:
            signal.alarm(SECONDS)
            print(json.dumps({**defuse(bomb.__name__, corpus, root), "reason": reason}), flush=True)
            os._exit(0)
        if os.waitpid(reader, 0)[1] != 0:
            print(json.dumps({"bomb": bomb.__name__, "error": "the process was killed"}), flush=True)


@pytest.fixture(scope="module")
def defused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    folder = tmp_path_factory.mktemp("bombs")
    command = [sys.executable, __file__, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    return {item["bomb"]: item for item in found}


@pytest.mark.parametrize("bomb", [bomb.__name__ for bomb in BOMBS])
def test_a_bomb_ends_as_a_named_drop_in_bounded_memory(defused: dict[str, dict[str, object]], bomb: str) -> None:
    found = defused[bomb]
    # Where nothing else can be read of the corpus, the first drop is the error.
    assert found["reason"] in found["reasons"] or "None of the videos" in str(found["error"]), found  # type: ignore[operator]
    assert int(found["kib"]) * 1024 < OTHER_BOUND_BYTES.get(bomb, BOUND_BYTES), found  # type: ignore[call-overload]
    assert int(found["disk"]) < BOUND_BYTES, found  # type: ignore[call-overload]
    # The libraries of a process that reads Parquet are 80 MiB; it may hold 64 MiB and six rows.
    assert int(found["children"]) < 180 * MIB + 6 * ROW_BYTES, found  # type: ignore[call-overload]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
