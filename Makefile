# make demo     everything from an empty folder: environment, base model, steps 1 to 7
# make smollm2  the same with SmolLM2, a real base model that it downloads
# make test     the tests, in parallel (builds the environment first)
# make check    ruff, mypy, and the tests
# make faults   kills, full disks, damaged files, lost processes; rewrites docs/reliability.md
# make audit    known vulnerabilities of the pinned packages; needs the network
# make extras   the optional packages too: chat page, lm-evaluation-harness, serving
# make lock     choose the versions of all packages that the pinned ones need; needs uv
# make clean    remove the results of the demo and of SmolLM2, keep the environment

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

VENV := .venv
PYTHON := $(VENV)/bin/python
# The first interpreter of a supported version; override with `make PYTHON3=...`.
PYTHON3 ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null \
	&& echo $$p && break; done)

.PHONY: demo smollm2 test check faults audit extras lock clean

# uv is several times as fast as pip.
UV := $(shell command -v uv)

# Install a requirements file; print the downloads and, on failure, the last lines of the log.
define install
	@if [ -n "$(UV)" ]; then $(UV) pip install -q --python $(PYTHON) -r $(1) -c requirements.lock; \
	else $(VENV)/bin/pip install -r $(1) -c requirements.lock 2>$(VENV)/install.log \
	| sed -un 's/^ *Downloading \([^ ]*\).* (\(.*\))$$/  \1 (\2)/p' \
	|| { tail -5 $(VENV)/install.log >&2; exit 1; }; fi
	@touch $@
endef

define seven_steps
	$(PYTHON) step1_train_tokenizer.py
	$(PYTHON) step2_merge_tokenizer.py
	$(PYTHON) step3_resize_model.py
	$(PYTHON) step4_prepare_data.py
	$(PYTHON) step5_train_pt.py
	$(PYTHON) step6_train_sft.py
	$(PYTHON) step7_eval.py
endef

demo: $(VENV)/ready
	$(PYTHON) demo/build_base_model.py
	$(seven_steps)

smollm2: export CHATGLM_JA_PROFILE := smollm2
smollm2: $(VENV)/extras
	$(PYTHON) demo/get_smollm2.py
	$(seven_steps)

# One thread per process: several processes with several threads each would slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 4

test: $(VENV)/dev
	$(PYTEST)

check: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy .
	$(PYTEST)

faults: $(VENV)/dev
	FUZZ_EXAMPLES=2000 $(PYTHON) -m pytest tests/faults --thorough --reliability docs/reliability.md

audit: $(VENV)/ready
	@$(VENV)/bin/pip install -q pip-audit==2.10.1
	$(VENV)/bin/pip-audit --disable-pip --no-deps -r requirements.txt
	$(VENV)/bin/pip-audit --disable-pip --no-deps -r requirements-extras.txt
	$(VENV)/bin/pip-audit --disable-pip --no-deps -r requirements-dev.txt

extras: $(VENV)/extras

# Hashes would name one of the several builds of a version of torch.
lock:
	$(UV) pip compile -q --upgrade --universal --python-version 3.11 --no-annotate --no-emit-index-url \
	--custom-compile-command "make lock" requirements.txt requirements-extras.txt \
	requirements-dev.txt -o requirements.lock

clean:
	rm -rf artifacts/demo artifacts/smollm2

$(VENV)/ready: requirements.txt requirements.lock
	@test -n "$(PYTHON3)" || { echo "error: no Python from 3.11 to 3.14 found: install one, or pass PYTHON3=/path/to/python" >&2; exit 1; }
	@echo "setting up $(VENV): a minute, or as long as the downloads below take"
	@rm -rf $(VENV) && $(PYTHON3) -m venv $(VENV)
	$(call install,requirements.txt)

$(VENV)/extras: $(VENV)/ready requirements-extras.txt
	@echo "setting up the optional packages"
	$(call install,requirements-extras.txt)

$(VENV)/dev: $(VENV)/extras requirements-dev.txt
	@echo "setting up what the tests need"
	$(call install,requirements-dev.txt)
