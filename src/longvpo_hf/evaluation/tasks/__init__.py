"""The folder that lmms-eval is given as `--include_path`: one YAML for each task and group, and the class they name."""
