"""Bounds on what comes from outside.

A corpus may be broken or hostile: a record of gigabytes, an archive of a megabyte that unpacks to terabytes. Each bound
is far above what real corpora need, is checked before the memory or the disk is used, and costs only what exceeds it:
a named drop that says which bound to raise. The builders have an option for each (`--max-bad-records`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from longvpo_hf.errors import ConfigError

MIB, GIB = 1024**2, 1024**3

#: What an archive may unpack to whatever its size: small ones of text compress well.
FREE_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """How much one record, video or archive of a corpus may be.

    Args:
        max_bad_records: So many malformed records and damaged archives are dropped by name; one more ends the run,
            since the corpus is then hardly what its reader expects. 0 ends it at the first.
        max_record_bytes: Bytes of one record: a line of JSON, a row of CSV, a JSON file of one record. Python needs up
            to 25 times as much memory for it.
        max_row_bytes: Bytes of one Parquet row with the video it holds. It passes through memory: a process that reads
            Parquet may hold six times as much, whatever a file claims.
        max_video_bytes: Bytes of one video that is unpacked from an archive.
        max_expansion: How many times its own size an archive or a Parquet row group may unpack to. Videos hardly
            compress, text about tenfold at most; what stays below 256 MiB is never too much.
        max_index_bytes: Bytes of an archive's or a Parquet file's own list of contents, which is held in memory: 32 MiB
            list some 300,000 files.
    """

    max_bad_records: int = 1_000
    max_record_bytes: int = 16 * MIB
    max_row_bytes: int = 160 * MIB
    max_video_bytes: int = 64 * GIB
    max_expansion: float = 10.0
    max_index_bytes: int = 32 * MIB

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name == "max_bad_records" else 1
            if not getattr(self, field.name) >= least:
                raise ConfigError(f"{field.name} must be ≥ {least}, got {getattr(self, field.name)}.")

    def expanded_bytes(self, num_bytes: int) -> int:
        """What something of `num_bytes` may unpack to."""
        return max(FREE_BYTES, int(self.max_expansion * num_bytes))
