"""The record: one JSON file, `longvpo.json`, beside rows or beside weights, that says how they came about.

Cards are rendered from it and programs read it, so that no fact has to be recovered from prose or from a path. It names
no folder of the machine it was written on and holds no token. Fields of a newer version are kept.
"""

from longvpo_hf.record.file import (
    RECORD_FILE,
    hub_commit,
    installed_versions,
    read_record,
    record_text,
    weights_digest,
    write_record,
)
from longvpo_hf.record.types import (
    FORMAT,
    AdapterRecord,
    DatasetRecord,
    EvaluationRecord,
    LicenceRecord,
    MethodRecord,
    ModelRecord,
    RecordError,
    Sampling,
    Source,
    TrainedOn,
    TrainingRecord,
)

__all__ = [
    "FORMAT",
    "RECORD_FILE",
    "AdapterRecord",
    "DatasetRecord",
    "EvaluationRecord",
    "LicenceRecord",
    "MethodRecord",
    "ModelRecord",
    "RecordError",
    "Sampling",
    "Source",
    "TrainedOn",
    "TrainingRecord",
    "hub_commit",
    "installed_versions",
    "read_record",
    "record_text",
    "weights_digest",
    "write_record",
]
