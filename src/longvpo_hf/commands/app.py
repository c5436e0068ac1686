"""The `longvpo` command and its subcommands. Their modules are light; those of `build` load when it is called."""

from __future__ import annotations

from longvpo_hf.commands import configs, probe, rows
from longvpo_hf.commands.audit import audit
from longvpo_hf.commands.check import check
from longvpo_hf.commands.cli import new_app, options_of_file, run
from longvpo_hf.commands.eval import evaluate
from longvpo_hf.commands.inspect import inspect
from longvpo_hf.commands.run import run as run_study
from longvpo_hf.commands.train import train

app = new_app("longvpo", "Preference optimisation for long video-language models.")
app.command("longvpo_hf.commands.build:app", name="build", help="Makes preference rows from videos.")
app.command(train)
app.command(evaluate, name="eval", config=options_of_file)
app.command(probe.app)
app.command(check)
app.command(inspect)
app.command(audit)
app.command(rows.app)
app.command(configs.app)
app.command(run_study, name="run")


def main() -> None:
    """Entry point of the `longvpo` command."""
    run(app)
