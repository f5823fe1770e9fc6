# One rule builds the environment everywhere: a fresh clone, a developer's machine, CI.
VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
STAMP := $(abspath $(VENV))/.built-from-pyproject
# the versions that the suite was run with; `make install CONSTRAINTS=` takes the newest ones instead
CONSTRAINTS ?= constraints.txt
Q := quickstart
# what `make lowest` runs: `make lowest LOWEST=tests` runs all
LOWEST ?= tests/nanodit tests/prep/dataset tests/prep/captions tests/train/checkpoint tests/train/model tests/evaluate/statistics

.PHONY: install constraints lowest quickstart gpu-check test soak lint
install: $(STAMP)
	@# an environment that several clones share follows the clone it was last used from
	@cd / && $(BIN)/python -c "import prep, sys; sys.exit(not prep.__path__[0].startswith('$(CURDIR)/'))" 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet --no-deps --editable '$(CURDIR)'

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[test]'
	touch $(STAMP)

# take the newest versions that go together, as names and versions; run the suite with them before committing
constraints:
	$(PYTHON) -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-newest/bin/python -m pip install --quiet --editable '.[export,s3,test]'
	$(VENV)-newest/bin/python -m pip freeze --exclude-editable > constraints.txt

# the lowest versions that pyproject.toml allows, in an environment of their own; then a few tests of all packages
lowest:
	$(PYTHON) -m venv --clear $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --upgrade pip uv
	$(VENV)-lowest/bin/uv pip compile --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct \
		--all-extras --output-file $(VENV)-lowest/lowest.txt pyproject.toml
	$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest/bin/python --requirement $(VENV)-lowest/lowest.txt
	$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest/bin/python --no-deps --editable .
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest $(LOWEST)

# figures -> shards -> a trained model -> a report, without any download
quickstart: install
	$(BIN)/nanodit prep figures $(Q)/figures --count 2500 --size 96 --seed 1 --short-captions
	$(BIN)/nanodit prep run --config configs/prep/quickstart.yaml
	$(BIN)/nanodit train run --config configs/train/quickstart.yaml
	$(BIN)/nanodit evaluate run --checkpoint $(Q)/run --config configs/evaluate/quickstart.yaml
	$(BIN)/nanodit evaluate report $(Q)/run --output $(Q)/report.html
	@printf '\n%s\n\n%s\n  %s\n  %s\n  %s\n' "The report: $(CURDIR)/$(Q)/report.html" "To go on:" \
		"$(VENV)/bin/nanodit train sample --checkpoint $(Q)/run --prompt 'A woman with long ginger hair stands in front of an azure wall. She wears a yellow jumper and black trousers.' --output $(Q)/sample.png" \
		"$(VENV)/bin/nanodit train run --config configs/train/figures-64-long.yaml" \
		"$(VENV)/bin/nanodit prep run --config configs/prep/production.yaml source=FOLDER output=DATASET"

# what only a GPU can confirm, in ten minutes: `make gpu-check CHECK="--json docs/gpu-NAME.jsonl"` keeps what it found
gpu-check: install
	$(BIN)/nanodit train gpu-check $(CHECK)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# random kills over preparing, training and sweeping: `make soak SEED=7 KILLS=200`
SEED ?= 1
KILLS ?= 20
soak: install
	$(BIN)/python -m tests.soak --seed $(SEED) --kills $(KILLS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
