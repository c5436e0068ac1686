"""Studies: from videos to a measured model in one command, as steps over artefacts: `longvpo run`.

study.py     what a study is, read from YAML; `shipped/` holds some
steps.py     its steps: programs, and what their results follow from
ledger.py    which steps are done, and what earlier settings left
running.py   runs them, one process each
planning.py  what they will cost, and what is missing
report.py    the page and the card's section
"""
