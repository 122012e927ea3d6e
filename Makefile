# Graft. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# Known forms of keys and tokens only: digests, which are all over the tests, look as random as secrets.
SECRETS_OPTIONS = --disable-plugin Base64HighEntropyString --disable-plugin HexHighEntropyString \
	--disable-plugin KeywordDetector

# On several cores, a file's tests on one of them: a file shares what it has made. Files in their own order: by number of
# tests, the longest would come last, on one core alone. Tiny models gain nothing from threads.
UNIT_TESTS = OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not engine" --numprocesses auto --maxprocesses 4 --dist loadfile \
	--no-loadscope-reorder
# One after the other. `make test ENGINES=2` runs two servers' tests side by side (tests/engine_scheduling.py): for more
# than two cores, and some 8 GB.
ENGINES ?= 0
ENGINE_TESTS = $(RUN) -m pytest -m engine --numprocesses $(ENGINES) --dist loadscope --no-loadscope-reorder

# Compiled modules are kept even where the surroundings forbid it: without them every start takes twice as long.
export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help environment demo serve observe test lint unit rehearse rehearse-kubectl docs sbom bench-convert bench-routes bench-swap bench-gateway bench-cpu-adapters \
	chaos soak hostile report clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

environment: ## Create or update .venv from the lock (seconds when nothing changed)
	@$(PYTHON) deploy/environment/create.py --venv $(VENV) --with quantizers

demo: environment ## The whole tour: fine-tune, convert, serve, ask, hot-swap under load
	@$(RUN) -m examples.demo

serve: environment ## Make what the demo makes, then serve it until Ctrl-C
	@$(RUN) -m examples.demo --keep-serving

observe: environment ## A server under load with Prometheus and Grafana's dashboards, until Ctrl-C
	@$(RUN) -m examples.observe

test: environment lint ## Lint, types, layering and all tests, with real engines
	@$(UNIT_TESTS)
	@$(ENGINE_TESTS)

unit: environment ## The tests that start no engine
	@$(UNIT_TESTS)

bench-convert: environment ## A merge beside cp: speed, memory; what the exact route loses (minutes, 22 GB of disk)
	@$(RUN) -m benchmarks.convert

bench-routes: environment ## What each way of conversion keeps: KL, size (minutes)
	@$(RUN) -m benchmarks.routes

bench-swap: environment ## A hot-swap under load: time, failures, latency (minutes)
	@$(RUN) -m benchmarks.swap

bench-gateway: environment ## What the gateway costs beside vLLM's own API server (three quarters of an hour)
	@$(RUN) -m benchmarks.gateway --case adapter
	@$(RUN) -m benchmarks.gateway --case merged
	@$(RUN) -m benchmarks.gateway --case real --turns 5

bench-cpu-adapters: environment ## Adapters on a CPU beside vLLM's own server, on a real model (minutes)
	@$(RUN) -m benchmarks.cpu_adapters

chaos: environment ## Break everything, one after the other, under load (a quarter of an hour; as root the disk too)
	@$(RUN) -m benchmarks.faults

soak: environment ## Mixed traffic, swaps and rude callers for half an hour: does anything grow?
	@$(RUN) -m benchmarks.soak

hostile: environment ## Thousands of bad requests and damaged files: what crashes, hangs, escapes or leaks (minutes)
	@$(RUN) -m benchmarks.hostile

report: environment ## One screen for each benchmark, from the committed results: docs/report.md
	@$(RUN) -m benchmarks.report

rehearse: environment ## What the manifests deploy, on three "nodes": an upgrade, a node that dies (root; ten minutes)
	@GRAFT_REHEARSE=1 $(RUN) -m pytest tests/e2e/nodes

rehearse-kubectl: environment ## The pages on Kubernetes typed word by word, on what their manifests run (root; minutes)
	@GRAFT_REHEARSE=1 $(RUN) -m pytest -s tests/deploy/rehearsal

lint: environment ## Style, types, static analysis, secrets
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy
	@$(RUN) -m bandit --quiet --severity-level medium --configfile pyproject.toml --recursive convert serve examples benchmarks deploy
	@git ls-files -z '*.py' '*.md' '*.yaml' '*.toml' '*.txt' 'Makefile' 'Dockerfile' '.ci/*' \
		| xargs -0 $(VENV)/bin/detect-secrets-hook $(SECRETS_OPTIONS)

docs: environment ## The documentation as a site: build/site/index.html; a dead link fails
	@$(RUN) docs/hooks/command_line.py
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
	@echo "written to build/site/index.html; with search: $(RUN) -m http.server --directory build/site 8080"

sbom: environment ## What is installed, as CycloneDX: build/sbom.cdx.json
	@mkdir -p build
	@$(RUN) -m cyclonedx_py requirements deploy/environment/cpu.lock --pyproject pyproject.toml --no-validate \
		--output-reproducible --output-format JSON --output-file build/sbom.cdx.json
	@echo "written to build/sbom.cdx.json"

clean: ## Remove the environment and everything built
	rm -rf $(VENV) build
