# Run `make` alone for the list of targets.

PYTHON_IN_VENV := .venv/bin/python
ARGS ?=
MINUTES ?= 10

.DEFAULT_GOAL := help
.PHONY: help demo test check check-style check-format check-types check-imports format model bench fuzz lock wheel clean
.PHONY: ready-test ready-dev ready-fuzz

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-8s %s\n", $$1, $$2 }'

demo: ## the main job, played before you (the same as ./demo)
	@./demo

test: ## all tests (the same as ./test); ARGS="-k replayed" goes to pytest
	@./test $(ARGS)

check: check-style check-format check-types check-imports ## style, types and the borders between trust domains
check-style: ready-dev
	.venv/bin/ruff check .
check-format: ready-dev
	.venv/bin/ruff format --check .
check-types: ready-dev
	.venv/bin/mypy
check-imports: ready-dev
	.venv/bin/lint-imports

format: ready-dev ## put the code into ruff's format, and fix what ruff can fix
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

model: ready-test ## walk through every state of a migration's handoff with spin
	$(PYTHON_IN_VENV) -m models

bench: ready-test ## measure, side by side with the system's swtpm; ARGS=--quick for a minute
	$(PYTHON_IN_VENV) -m benchmarks $(ARGS)

fuzz: ready-fuzz ## feed hostile bytes to every parser; MINUTES=10
	$(PYTHON_IN_VENV) -m fuzz --minutes $(MINUTES) $(ARGS)

# dev.txt is resolved first and the others follow it, so that no version differs between them.
UV_COMPILE = .venv/bin/uv --quiet pip compile --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --no-config

lock: ready-dev ## pin the newest versions of all dependencies in requirements/*.txt
	cd requirements && rm -f new-*.txt && set -e; run() { out=$$1; shift; \
	    (cd .. && $(UV_COMPILE) --upgrade "$$@" -o "requirements/new-$$out.txt" >/dev/null); }; \
	run dev pyproject.toml --extra platform requirements/build.in requirements/test.in requirements/dev.in; \
	run build requirements/build.in -c requirements/new-dev.txt; \
	run runtime pyproject.toml --extra platform -c requirements/new-dev.txt; \
	run test pyproject.toml --extra platform requirements/test.in -c requirements/new-dev.txt; \
	run fuzz pyproject.toml --extra platform requirements/test.in requirements/fuzz.in -c requirements/new-dev.txt; \
	for new in new-*.txt; do mv "$$new" "$${new#new-}"; done

wheel: ready-dev ## build the wheel into dist/
	$(PYTHON_IN_VENV) -m pip --disable-pip-version-check wheel --no-build-isolation --no-deps --wheel-dir dist .

clean: ## remove what was built, and caches; .venv stays (the next run compiles again)
	rm -rf build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks fuzz models -name __pycache__ -prune -exec rm -rf {} +
	find src \( -name '_*.so' -o -name '_*.o' -o -name '_*.c' \) -delete

ready-test ready-dev ready-fuzz: ready-%:
	@scripts/setup.sh $*
