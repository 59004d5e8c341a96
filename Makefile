# Every target sets up what it needs from nothing but Python >= 3.11 and make; a stamp file makes the second run fast.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTOS_VENV := .tools/protos
SBOM_VENV := .tools/sbom
# Without compiling: torch and transformers have thousands of modules, of which few are ever imported. Those that are
# must then keep their bytecode, or every process compiles them anew, for seconds.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile

# A layer without tests is left out. Tests of the first layers share nothing and run on all cores; files of the others
# start a Ray each and run two at a time.
layers_of = $(foreach layer,$(1),$(wildcard tests/$(layer)))
PLAIN_LAYERS := $(call layers_of,unit rpc)
RAY_LAYERS := $(call layers_of,cluster faults browser gpu)
# The scripts that end within minutes.
BENCHMARKS := layer planner held_out live_balance recovery loading serving
DURATION ?= 600

.DELETE_ON_ERROR:
.PHONY: help demo test test-hosts system-deps check lint sizes types imports stale-protos stale-pages links licenses \
	manifests dockerfile bench protos docs models-page dist sbom soak clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.runtime  ## train a small model on a local cluster, generate from it, kill an expert meanwhile
	$(BIN)/moecluster demo

test: $(VENV)/.dev $(SBOM_VENV)/.installed  ## every test that needs no special machine: unit, rpc, cluster, faults, browser, gpu
	@failed=0; \
	$(BIN)/python -m pytest -n auto --maxprocesses=8 --dist worksteal --durations=10 $(PLAIN_LAYERS) || failed=1; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=10 $(RAY_LAYERS) || failed=1; \
	exit $$failed

test-hosts: $(VENV)/.dev  ## ray up on three hosts (network namespaces with sshd), jobs, lost hosts; as root, after system-deps
	$(BIN)/python -m pytest --durations=10 tests/hosts

system-deps:  ## Debian packages for tests that need more than Python: prometheus, sshd; starts no service
	@tools/install_system_deps.sh

check: lint sizes types imports stale-protos stale-pages links licenses manifests dockerfile  ## style, sizes, types, import layers, generated files, links, licences, manifests

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

sizes: $(VENV)/.dev
	$(BIN)/python tools/check_file_sizes.py

types: $(VENV)/.dev
	$(BIN)/mypy .

imports: $(VENV)/.dev
	$(BIN)/lint-imports

stale-protos: $(PROTOS_VENV)/.installed
	$(PROTOS_VENV)/bin/python tools/generate_protos.py --check

stale-pages: $(VENV)/.dev
	$(BIN)/python -m tools.generate_reference_pages --check
	$(BIN)/python -m tools.generate_prometheus_rule --check
	$(BIN)/python -m tools.generate_boards --check

links: $(VENV)/.dev
	$(BIN)/python tools/check_links.py

licenses: $(VENV)/.dev  ## licences of all packages that users get, against the list in pyproject.toml
	@$(BIN)/python -m tools.licenses > /dev/null

# MOECLUSTER_CRDS=FOLDER names the CRDs of KubeRay and the Prometheus operator, which are not of this repository.
manifests: $(VENV)/.dev
	$(BIN)/python -m tools.validate_manifests

dockerfile: $(VENV)/.dev
	$(BIN)/hadolint Dockerfile

bench: $(VENV)/.dev  ## the benchmarks that end within minutes; results go to benchmarks/results
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

protos: $(PROTOS_VENV)/.installed  ## generate moecluster/proto from protos/
	$(PROTOS_VENV)/bin/python tools/generate_protos.py

docs: $(VENV)/.dev  ## write what is made of the code: pages of settings and metrics, rules for the Prometheus operator, Grafana boards
	$(BIN)/python -m tools.generate_reference_pages
	$(BIN)/python -m tools.generate_prometheus_rule
	$(BIN)/python -m tools.generate_boards

models-page: $(VENV)/.dev  ## try every family of the installed transformers, and write docs/models.md; minutes
	$(BIN)/python -m tools.generate_models_page

dist: $(VENV)/.dev  ## wheel and sdist, built and checked, and what else a node of clusters/*.yaml installs with, in dist/
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	cp constraints.txt clusters/node_setup.sh dist

sbom: $(VENV)/.dev $(SBOM_VENV)/.installed  ## bill of materials (CycloneDX) of what users get, in dist/
	@mkdir -p dist
	$(BIN)/python -m tools.sbom dist/moecluster.cdx.json

soak: $(VENV)/.fuzz  ## long runs, each of DURATION seconds (600 unless given), and those of test-hosts
	MOECLUSTER_SOAK_DURATION_S=$(DURATION) $(BIN)/python -m pytest --timeout=0 --durations=10 tests/soak tests/hosts

clean:  ## remove environments, caches and what a build left
	rm -rf $(VENV) .tools .peers build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find moecluster actors tests tools benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# One line instead of a traceback from pip when Python is too old or lacks venv.
define create_venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "moecluster needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
@test -x $(1)/bin/pip || $(PYTHON) -m venv $(1) || \
	{ echo "$(PYTHON) cannot create environments: install its venv module (Debian: apt install python3-venv)" >&2; exit 1; }
endef

$(VENV)/.created:
	$(call create_venv,$(VENV))
	@touch $@

$(VENV)/.runtime: $(VENV)/.created pyproject.toml constraints.txt
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[plots,serve]'
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.fuzz: $(VENV)/.dev
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[fuzz]'
	@touch $@

# Only what one extra names: the project's own dependencies are newer than what the oldest generator of protos takes.
PACKAGES_OF = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"])

$(PROTOS_VENV)/.installed: pyproject.toml
	$(call create_venv,$(PROTOS_VENV))
	$(PROTOS_VENV)/bin/python $(PIP_INSTALL) $$($(PROTOS_VENV)/bin/python -c '$(call PACKAGES_OF,protos)')
	@touch $@

$(SBOM_VENV)/.installed: pyproject.toml constraints.txt
	$(call create_venv,$(SBOM_VENV))
	$(SBOM_VENV)/bin/python $(PIP_INSTALL) -c constraints.txt $$($(SBOM_VENV)/bin/python -c '$(call PACKAGES_OF,sbom)')
	@touch $@
