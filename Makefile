# Two commands do everything on a fresh machine with Python >= 3.11 and git: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
FIRST := tests paramdiff cli/paramdiff_cli

.PHONY: demo test check lint types docs figures notebooks bench sample-data clean

demo: $(READY)  ## compare two real checkpoints of sample_data
	$(BIN)/paramdiff sparsity sample_data/base sample_data/rl-sgd --tol 1e-5 --out out/demo
	$(BIN)/paramdiff layers sample_data/base sample_data/rl-sgd
	$(BIN)/paramdiff report sample_data/base sample_data/rl-sgd sample_data/sft --tol 1e-5 -o out/demo.html

test: $(READY) lint types  ## everything that CI runs
	$(BIN)/pytest -n auto --doctest-modules $(FIRST) --cov --cov-report=term:skip-covered

check: $(READY) lint types  ## the quick part of it, under three minutes
	$(BIN)/pytest -n auto --doctest-modules $(FIRST) -q -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

figures: $(READY)  ## the pictures of the README, which need Chromium
	$(BIN)/python docs/make_pictures.py

notebooks: $(READY)  ## run the notebooks again and keep their outputs
	$(BIN)/python notebooks/run.py

docs: $(READY)  ## docs/columns.md from paramdiff/columns.py
	$(BIN)/python -c "from paramdiff.columns import markdown; print(markdown(), end='')" > docs/columns.md

bench: $(READY)  ## side by side with other tools: 10 GB of disk, half an hour
	test -d benchmarks/.venv-peers || bash benchmarks/setup_peers.sh
	test -d benchmarks/data/base || $(BIN)/python benchmarks/make_pair.py benchmarks/data
	$(BIN)/python benchmarks/run.py benchmarks/data
	$(BIN)/python benchmarks/ranks.py benchmarks/data
	$(BIN)/python benchmarks/report.py

sample-data: $(READY)  ## train the checkpoints of sample_data again
	$(BIN)/pip install -q -c constraints.txt -e '.[sample-data]'
	$(BIN)/python sample_data/make_sample_data.py

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("paramdiff needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv out .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
