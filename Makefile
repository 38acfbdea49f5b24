# `make demo` and `make test` do everything, set-up included. `make help` lists the rest.

CARGO ?= cargo
ARGS ?=
# The tools are no dependencies; whoever has another version installed uses that one.
CARGO_DENY := 0.20.2
CARGO_FUZZ := 0.13.2

# Where `make kafka` keeps its node.
KAFKA := ops/kafka/cluster target/kafka/hands-on

.PHONY: help setup test-setup demo kafka test faults hostile fuzz bench bench-tasks fetching parts cuda lint deny

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: ## Install the system packages that the build needs
	@ops/system-deps.sh

demo: setup ## Run the main job: embedded broker, image server, worker, demo model (ARGS=--keep-running leaves it up)
	$(CARGO) run --locked -- demo $(ARGS)

# The system's oneDNN is of version 2 on some releases, of version 3 on others; the tests want version 3 in any case.
ONEDNN := target/tools/onednn
SCHEMATHESIS := target/tools/schemathesis
test-setup: setup ## Install what the tests need, too (Java 17, Maven, kcat, oneDNN, libjpeg-turbo, schemathesis, images of other decoders)
	@ops/system-deps.sh --tests
	@test -e $(ONEDNN)/lib/libdnnl.so.3 || \
		{ python3 -m venv $(ONEDNN) && $(ONEDNN)/bin/pip install --quiet onednn-cpu-gomp==2023.2.0; } || test -z "$$CI"
	@test -x $(SCHEMATHESIS)/bin/schemathesis || \
		{ python3 -m venv $(SCHEMATHESIS) && $(SCHEMATHESIS)/bin/pip install --quiet schemathesis==4.32.5; } || test -z "$$CI"
	@ops/image-corpora || true # It says what it could not have; the test says whether the rest is enough.

kafka: test-setup ## Start Apache Kafka, one node with the topics of the defaults, and print its bootstrap servers
	@servers=$$($(KAFKA) start) && \
	KAFKA_TOPICS="$(KAFKA) tool topics" ops/kafka/create-topics.sh "$$servers" >/dev/null && \
	printf '%s\n' "Apache Kafka answers at $$servers, with these topics:" && \
	$(KAFKA) tool topics --list --exclude-internal | sed 's/^/  /' && \
	printf '%s\n' "A worker on it:  blipstream worker --set kafka.bootstrap_servers=$$servers --set model.source=demo" \
	  "Stop it:         $(KAFKA) stop     (make kafka starts it again, with what it holds)" \
	  "Remove it:       $(KAFKA) remove"

test: test-setup ## Run every test (those on Apache Kafka are skipped where Java and Maven cannot be had)
	$(CARGO) test --locked

faults: test-setup ## Run the whole fault matrix on Apache Kafka (2 h) and write docs/faults.md (ARGS=--resume goes on)
	$(CARGO) test --locked --test faults -- --all --record $(ARGS)

hostile: test-setup ## Play every trick of an image server on a worker and write docs/hostile-input.md (12 min)
	BLIPSTREAM_RECORD=1 $(CARGO) test --locked --test hostile -- --test-threads 1 --nocapture

# The versions of the program's own lock file are fuzzed; cargo adds those that only the fuzzer needs.
fuzz/Cargo.lock: Cargo.lock
	cp $< $@

# What a run finds to be new goes to the first folder of a target, the kept inputs are in the second. Without a sanitizer
# the stable compiler will do; it is for memory, and almost all of the code is safe.
FUZZ := target/fuzz
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= request reference address decode config
fuzz: setup fuzz/Cargo.lock ## Feed made-up input to what reads a stranger's bytes, a minute each (FUZZ_SECONDS=60)
	@command -v cargo-fuzz >/dev/null || test -x target/tools/bin/cargo-fuzz || \
		$(CARGO) install --quiet --debug --locked --version $(CARGO_FUZZ) --root target/tools cargo-fuzz
	@export PATH="$$PWD/target/tools/bin:$$PATH" failed=; \
	$(CARGO) fuzz build --sanitizer none --target-dir $(FUZZ) || exit 1; \
	for target in $(FUZZ_TARGETS); do \
		mkdir -p target/fuzz-corpus/$$target; \
		$(CARGO) fuzz run --sanitizer none --target-dir $(FUZZ) $$target target/fuzz-corpus/$$target fuzz/corpus/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=2048 -timeout=20 -print_final_stats=1 || failed="$$failed $$target"; \
	done; \
	test -z "$$failed" || { echo "Failed:$$failed. The inputs are in fuzz/artifacts."; exit 1; }

BENCH := target/bench
bench: setup ## Measure against transformers and candle-transformers on this CPU (95 min) and write docs/benchmarks.md
	test -x $(BENCH)/venv/bin/python || python3 -m venv $(BENCH)/venv
	$(BENCH)/venv/bin/pip install --quiet --requirement benches/requirements.txt
	test -f $(BENCH)/random-base/vocab.txt || $(BENCH)/venv/bin/python benches/peer.py $(BENCH)/random-base --make
	$(CARGO) build --locked --bin blipstream --example candle_blip
	$(BENCH)/venv/bin/python benches/compare.py target/debug/blipstream target/debug/examples/candle_blip \
		$(BENCH)/random-base --write docs/benchmarks.md $(ARGS)

bench-tasks: setup ## Measure beams, the filter and the endpoint on this CPU (16 min), into their sections of docs/benchmarks.md
	$(CARGO) build --locked --bin blipstream
	python3 benches/tasks.py target/debug/blipstream --write docs/benchmarks.md

fetching: setup ## Measure fetch and decode against img2dataset (10 min) and write docs/benchmarks-fetching.md
	test -x $(BENCH)/fetching-venv/bin/python || python3 -m venv $(BENCH)/fetching-venv
	$(BENCH)/fetching-venv/bin/pip install --quiet --requirement benches/requirements-fetching.txt
	$(CARGO) build --locked --bin blipstream --example image_server
	$(BENCH)/fetching-venv/bin/python benches/fetching.py target/debug/blipstream target/debug/examples/image_server \
		--write docs/benchmarks-fetching.md $(ARGS)

parts: setup ## Measure the parts of the captioner one by one, with Criterion (3 min)
	$(CARGO) bench --locked --profile dev --bench parts -- $(ARGS)

cuda: setup ## Build the program for NVIDIA GPUs into target/cuda/dist, without a GPU or a CUDA toolkit (40 min)
	CARGO="$(CARGO)" ops/cuda-build

lint: setup ## Check format and lints
	$(CARGO) fmt --check
	$(CARGO) fmt --check --manifest-path fuzz/Cargo.toml
	$(CARGO) clippy --locked --all-targets -- -D warnings

deny: ## Check licences and sources of the dependencies
	@command -v cargo-deny >/dev/null || test -x target/tools/bin/cargo-deny || \
		$(CARGO) install --quiet --debug --locked --version $(CARGO_DENY) --root target/tools cargo-deny
	$(CARGO) fetch --quiet --locked
	PATH="$$PWD/target/tools/bin:$$PATH" $(CARGO) deny --offline check --hide-inclusion-graph licenses bans sources
