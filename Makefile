# `make demo` and `make test` set everything up by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.installed

.PHONY: demo test test-full test-peers lint docs format bench bench-quality clean

demo: $(STAMP)
	rm -rf demo-text
	$(BIN)/fairseq2 vembed demo text demo-text

# Files in their order: those that take longest come first, so that no worker waits for the other at the end.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-full: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --hypothesis-profile explore

# Folders of other libraries, read and written, with the newest versions and with ours. About two minutes; it also
# writes the table of docs/compatibility.md.
test-peers: $(STAMP) $(PEERS_STAMP)
	OMP_NUM_THREADS=1 PEERS_PYTHON=$(CURDIR)/$(PEERS)/bin/python \
		$(BIN)/python -m pytest -n 0 tests/peers --table docs/compatibility.md

# mypy looks for modules in folders, so it sees the package as it is installed.
lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build/typing && mkdir -p build/typing/vembed_fs2
	ln -s $(CURDIR)/vembed_fs2/* $(CURDIR)/recipes $(CURDIR)/assets build/typing/vembed_fs2/
	cd build/typing && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p vembed_fs2

# A site of the guides and the API, in build/docs. A link or a name that leads nowhere is an error.
docs: $(STAMP)
	rm -rf build/docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# About 40 minutes, on a machine that does nothing else.
bench: $(STAMP) $(PEERS_STAMP)
	$(BIN)/python benchmarks/train_step.py --check --repeats 0
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/loss_memory.py
	$(BIN)/python benchmarks/scaling.py --min 256 --max 16384 --repeats 1

# About an hour.
bench-quality: $(STAMP) $(PEERS_STAMP)
	$(BIN)/python benchmarks/quality.py

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info demo-text demo-images .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Anew when the dependencies changed.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12) and "Python 3.10 to 3.12 is needed; set PYTHON=python3.11, say.")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# Anew when what we compare with changed. It sees the packages of the first environment, and has those of its own that
# must be newer: so there is no second torch. pip says that they do not fit fairseq2, which is not used there.
$(PEERS_STAMP): benchmarks/peers.txt $(STAMP)
	rm -rf $(PEERS)
	$(BIN)/python -m venv $(PEERS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	$(PEERS)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(PEERS)/bin/python -m pip install --quiet -r benchmarks/peers.txt
	touch $@
