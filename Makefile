# make        set up .venv and run the miniature (60 minutes on 2 idle cores; later runs only what changed)
# make setup  set up .venv alone
# make test   set up .venv and run the tests, in two processes side by side (TESTERS=0: in one)
# make verify_scorers   ours against the official scorer packages, which go into .venv-oracle (10 minutes)
PYTHON ?= python3
CORES ?= 2
TESTERS ?= 2
VENV := .venv
ORACLE := .venv-oracle
EXPORT := --quiet --frozen --no-hashes --no-emit-project --no-annotate --no-header
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export OMP_NUM_THREADS := 1

.PHONY: all setup test lint readme verify_scorers lock clean-env
all: $(VENV)/ready
	snakemake --cores $(CORES) --rerun-incomplete
	@python -m pso.runs

setup: $(VENV)/ready

test: $(VENV)/ready
	python -m pytest --numprocesses $(TESTERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/ready
	ruff check .
	ruff format --check .
	snakefmt --check workflow
	snakemake --lint

# the README's numbers, from results/miniature
readme: $(VENV)/ready
	python -m eval.readme

verify_scorers: $(VENV)/ready $(ORACLE)/ready
	snakemake --cores 1 --forcerun verify_scorers -- verify_scorers

# Python 3.11 as in envs/oracle.yaml; any that has wheels of these versions will do
$(ORACLE)/ready: envs/oracle.txt requirements.lock
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	$(ORACLE)/bin/python -m pip install --quiet --disable-pip-version-check -r envs/oracle.txt
	$(ORACLE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps image-reward==1.5 hpsv2==1.2.0
	@touch $@

# torch first and by its public version: the same line takes the CPU or the CUDA build of the machine
$(VENV)/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); sys.exit(None if ok else "error: $(PYTHON) is %d.%d; Python 3.11 to 3.13 is needed: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# exact public versions for every platform, without hashes and addresses
# (needs uv; torch's own CUDA packages are left to pip, which takes those of the chosen build)
lock:
	uv lock --quiet
	{ uv export $(EXPORT) --group dev | grep '^torch=='; uv export $(EXPORT) --group dev --prune torch; } > requirements.lock
	{ uv export $(EXPORT) --only-group score | grep '^torch=='; uv export $(EXPORT) --only-group score --prune torch; } > envs/score.txt
	uv export $(EXPORT) --only-group driver > envs/driver.txt
	rm uv.lock

clean-env:
	rm -rf $(VENV) $(ORACLE)
