"""`longvpo build`: one command for each method."""

from __future__ import annotations

from longvpo_hf.commands.build import stage1, stage2, temporal
from longvpo_hf.commands.cli import new_app, options_of_file

app = new_app("build", "Makes preference rows from videos.", config=options_of_file)
app.command(stage1.build, name="stage1")
app.command(stage2.build, name="stage2")
app.command(temporal.build, name="temporal")
