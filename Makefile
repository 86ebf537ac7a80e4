# Both `make demo` and `make test` create everything they need in .venv; nothing is downloaded when the tools run.
PYTHON ?= python3
# Any build of torch 2.13; a wheel file does too.
TORCH ?= torch==2.13.0
BIN := .venv/bin
READY := .venv/.ready

# torch comes first and pinned, so that no other package chooses a build of it.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

install: $(READY)

demo: $(READY)
	$(BIN)/defaker-opt quantize --recipe int8
	$(BIN)/defaker-opt run exported/reference-int8 \
	  "$$($(BIN)/python -c 'import pathlib, skimage; print(pathlib.Path(skimage.__file__).parent / "data" / "astronaut.png")')" \
	  --gate 0 --overlay-dir demo --mask-dir demo
	@echo "the mask over the photo: demo/astronaut_overlay.png"

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not slow and not ci"

test-ci: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m ci

test-all: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(READY)
	$(BIN)/ruff format --check toolkit tests profiling
	$(BIN)/ruff check toolkit tests profiling
	$(BIN)/mypy

clean:
	rm -rf .venv demo

.PHONY: install demo test test-ci test-all check clean
