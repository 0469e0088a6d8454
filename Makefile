# make run: install and run the main job.   make test: install and check everything.
# make quick: before every commit, under 90 s.   make nightly: also what takes long, builds or downloads.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
OLD := build/oldest
OTHER_FLOWER := 'flwr[simulation]==1.42.*'

# the rooms of `make quick`, without their slow tests: no Ray, no Flower, no contracts of every strategy
QUICK := tests/test_house.py tests/test_docs.py tests/test_readme.py $(addprefix tests/,config exchange local report sampling \
	system task topology tracking)
# what `make oldest` runs
SMOKE := tests/test_readme.py $(addprefix tests/,config exchange run system task tracking)

.PHONY: run quick test nightly docs lint format bench dist oldest flowers clean

run: .venv/run.stamp
	$(BIN)/fedsim -m experiment=quickstart strategy=fedavg,fedspeed

quick: .venv/test.stamp lint
	$(BIN)/python -m mypy
	$(PYTEST) -m "not slow and not nightly" $(QUICK)

test: .venv/test.stamp lint
	$(BIN)/python -m mypy
	$(PYTEST)

# trends, the notebook, the pages' command lines; the site, the built distributions and the oldest versions allowed
nightly: test docs dist oldest
	$(PYTEST) -m nightly

# build/site: all pages, a page per method and the reference; no network, and a warning or a dead link is an error (not with --quiet,
# which drops warnings before they are counted)
docs: .venv/test.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: .venv/test.stamp
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports --no-logo

format: .venv/test.stamp
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: .venv/test.stamp
	$(BIN)/python -m benchmarks.overhead

# build/dist: the wheel and the source distribution; a run of the wheel in an environment that holds nothing else
dist: .venv/test.stamp
	rm -rf build/dist build/empty
	$(BIN)/python -m hatchling build --directory build/dist
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt build/dist/*.whl
	mkdir build/empty/run
	cd build/empty/run && ../bin/fedsim -m experiment=quickstart strategy=fedavg,fedspeed rounds=2 resume=never

# the oldest versions that pyproject.toml allows, in a venv of their own
oldest:
	mkdir -p build
	$(PYTHON) .ci/oldest.py > build/oldest.txt
	test -x $(OLD)/bin/python || $(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install --quiet --constraint build/oldest.txt --editable '.[data,detection,privacy,compression,sweep]' \
		pytest pytest-timeout hypothesis psutil pycryptodome cryptography
	$(OLD)/bin/python -m pip freeze --exclude-editable > build/oldest-installed.txt
	$(OLD)/bin/python -m pytest -m "not slow and not nightly" $(SMOKE)
	$(OLD)/bin/fedsim -m experiment=quickstart strategy=fedavg,fedspeed rounds=2 out=build/runs resume=never
	$(OLD)/bin/fedsim experiment=quickstart engine=ray engine.early=false engine.workers=2 rounds=2 out=build/runs resume=never

# the deployment tests on the other of the two minor versions of Flower that pyproject.toml allows, beside everything else as it is
flowers: .venv/test.stamp
	test -x build/flower/bin/python || $(PYTHON) -m venv build/flower
	build/flower/bin/python -m pip install --quiet --disable-pip-version-check $(OTHER_FLOWER)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$(build/flower/bin/python -c "import site; print(site.getsitepackages()[0])")/beside.pth
	build/flower/bin/python -m pytest -m "" tests/flower

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build

# torch first and at its pin, so that no other package chooses it
.venv/torch.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/run.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) --editable .
	touch $@

.venv/test.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps byzfl # what rules are compared with; its torchvision is not needed for them
	touch $@ .venv/run.stamp
