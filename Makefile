# `make demo` and `make test` do everything, set-up included. `make help` lists the rest.

CARGO ?= cargo
ARGS ?=
# The tool is no dependency; whoever has another version installed uses that one.
CARGO_DENY := 0.20.2

.PHONY: help setup demo test lint deny

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: ## Install the system packages that the build needs
	@ops/system-deps.sh

demo: setup ## Run the main job: embedded broker, image server, worker, demo model (ARGS=--keep-running leaves it up)
	$(CARGO) run --locked -- demo $(ARGS)

test: setup ## Run every test
	$(CARGO) test --locked

lint: setup ## Check format and lints
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings

deny: ## Check licences and sources of the dependencies
	@command -v cargo-deny >/dev/null || test -x target/tools/bin/cargo-deny || \
		$(CARGO) install --quiet --debug --locked --version $(CARGO_DENY) --root target/tools cargo-deny
	$(CARGO) fetch --quiet --locked
	PATH="$$PWD/target/tools/bin:$$PATH" $(CARGO) deny --offline check --hide-inclusion-graph licenses bans sources
