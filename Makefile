# One word for each thing one does here. Every target sets up first (scripts/setup.sh): at once when nothing changed.
.PHONY: setup demo check test wheel bench lock

# Test processes, of one thread each; a file's tests stay together. Many wait for children, so one more than CI has cores.
# 0 is one process with torch's own threads.
WORKERS ?= 3

# Files beginning with _ are helpers of the others.
BENCHMARKS := $(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)))

# Whatever environment is active in the caller's shell, ours is the one that runs.
export VIRTUAL_ENV := $(CURDIR)/.venv

setup:
	@sh scripts/setup.sh

demo: setup
	PATH="$(CURDIR)/.venv-uv/bin:$$PATH" uv run longvpo run miniature

check: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

test: setup
ifeq ($(WORKERS),0)
	.venv/bin/python -m pytest $(ARGS)
else
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)
endif

# Installs the wheel with its dependencies into an empty environment: slow, needs the package index.
wheel: setup
	PATH="$(CURDIR)/.venv-uv/bin:$$PATH" LONGVPO_TEST_EMPTY_VENV=1 .venv/bin/python -m pytest tests/test_package.py -k empty_venv

bench: setup
ifeq ($(BENCHMARKS),)
	@echo "bench: there are no benchmarks in benchmarks/*.py yet"
else
	@for file in $(BENCHMARKS); do echo "bench: $$file"; .venv/bin/python "$$file" || exit 1; done
endif

# Resolves again with as few changes as possible: after a change of the dependencies in pyproject.toml, or with
# UPGRADE=--upgrade to move everything forward. Needs the package index.
lock: setup
	@for pair in "pyproject.toml --all-extras:constraints.txt" "scripts/uv.in:scripts/uv.txt"; do \
		from=$${pair%%:*} to=$${pair##*:}; \
		sed -i.before '/^# sealed/d' $$to && rm $$to.before; \
		PATH="$(CURDIR)/.venv-uv/bin:$$PATH" uv pip compile --universal $$from --no-annotate --no-header --quiet \
			--generate-hashes $(UPGRADE) --output-file $$to || exit 1; \
		printf '# sealed %s\n' "$$(.venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' $$to)" >>$$to; \
	done
