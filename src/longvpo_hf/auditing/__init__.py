"""Whether preference rows teach what they should: `longvpo audit`.

Rows fail by shortcuts. If the chosen answer is the longer one, or names a colour that the rejected one never names, a
model learns that, and needs no video for it. Most items here are therefore *judges that see no video*: rules that pick
the chosen answer of a row from the texts alone. A fair coin is right in half of the rows; a judge that is right in more
has found a shortcut. The other items look at where the evidence stands, at clips and at their sources.
"""

from longvpo_hf.auditing.audit import AuditSettings, audit_folder, audit_rows
from longvpo_hf.auditing.findings import Audit, Finding, Verdict
from longvpo_hf.auditing.page import write_audit

__all__ = ["Audit", "AuditSettings", "Finding", "Verdict", "audit_folder", "audit_rows", "write_audit"]
