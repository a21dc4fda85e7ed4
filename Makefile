# make test | bench | gpu | build | lint | typecheck | clean, each from nothing: the virtual environment, its packages and
# the native code are made when missing or out of date. PYTHON= chooses the interpreter that .venv is made with, and
# a torch which that one has is used; ARGS= is passed on, as in `make bench ARGS=--quick`.

PYTHON ?= python3
ARGS ?=
TORCH := torch==2.13.0
# A torch that is there brings its own. There are no others for a CPU build, and no wheels for other systems.
TRITON := "triton==3.6.0; sys_platform == 'linux' and platform_machine == 'x86_64'"
BUILD_REQUIRES := "setuptools>=77.0.3" "cmake>=3.22" ninja "pybind11>=2.13"

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check

.DELETE_ON_ERROR:
.PHONY: build test bench gpu lint typecheck clean

# Files go to as many processes as there are cores, in the order of their names: the compilations, which come first, take
# longest. Threads that wait must not keep the other processes from running. The emulation of GPUs takes over memory
# management, so its tests have processes of their own. Status 5: none of the tests was asked for.
PYTEST := OMP_WAIT_POLICY=passive $(RUN) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: build
	$(PYTEST) tests/kernels tests/native $(ARGS) || [ $$? = 5 ]
	$(PYTEST) tests --ignore tests/kernels --ignore tests/native $(ARGS) || [ $$? = 5 ]

bench: build
	$(RUN) -m adakernels bench $(ARGS)

# On a machine with an NVIDIA GPU, with the packages that the interpreter has: .venv is not made.
gpu:
	@.ci/gpu $(PYTHON)

lint: build
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

typecheck: build
	$(RUN) -m mypy

build: $(VENV)/installed build/native

clean:
	rm -rf build dist *.egg-info adakernels/*.so adakernels/_why_not_native.txt
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find adakernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

ifneq ($(MAKECMDGOALS),gpu)
ifneq ($(origin PYTHON),file)
ifneq ($(wildcard $(VENV)/made-with),)
ifneq ($(shell cat $(VENV)/made-with),$(PYTHON))
$(error $(VENV) was made with $(shell cat $(VENV)/made-with); remove it to use $(PYTHON))
endif
endif
endif
endif

# An interpreter inside a virtual environment cannot lend its packages by --system-site-packages; a .pth file lends
# those of any interpreter.
$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "adakernels needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  echo 'using the torch of $(PYTHON)'; \
	  $(PYTHON) -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
	    > "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth"; \
	fi
	@echo '$(PYTHON)' > $(VENV)/made-with

$(VENV)/tools: $(VENV)/pyvenv.cfg Makefile
	@$(RUN) -c 'import torch; raise SystemExit(torch.__version__ < (2, 10))' 2>/dev/null || $(PIP) install $(TORCH) $(TRITON)
	$(PIP) install --quiet $(BUILD_REQUIRES)
	@touch $@

build/native: $(VENV)/tools setup.py CMakeLists.txt $(shell find csrc)
	$(RUN) setup.py --quiet build_ext --inplace
	@touch $@

# In this mode the checkout comes first on the path, before an adakernels among the packages that are lent.
$(VENV)/installed: build/native pyproject.toml
	$(PIP) install --quiet --no-build-isolation --config-settings editable_mode=compat --editable '.[lint,test]'
	@touch $@
