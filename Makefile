# The targets that a user needs are run, demo and test; README.md says more.

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)
BUILD   := CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)'
# The race detector needs a C compiler; without one the tests run without it.
RACE    := $(if $(shell command -v gcc || command -v cc),-race,)
FUZZTIME ?= 30s

.PHONY: build run demo test vet unit race synapse-module-test synapse-check synapse-trial fuzz bench hostile cross qemu crash sim clean

build: ## ./fsbus for this machine
	$(BUILD) -o fsbus .

run: build ## fsbus with the example configuration
	./fsbus run -config config.example.toml

demo: ## fsbus before 500 simulated servers, a third of them dead: no root, no network, no homeserver
	CGO_ENABLED=0 go run -trimpath ./scripts/demo

test: vet unit synapse-module-test cross ## everything that must pass: vet, also for 32 bit; all tests; the cross builds

vet:
	@test -z "$$(gofmt -l .)" || { echo 'gofmt would change:'; gofmt -l .; exit 1; }
	CGO_ENABLED=0 go vet ./...
	CGO_ENABLED=0 GOARCH=arm GOARM=7 go vet ./...

unit:
	go test $(RACE) -shuffle=on -count=1 ./...

race: ## the tests under the race detector, ten times over
	go test -race -shuffle=on -count=10 ./bus/... ./sched ./netx

synapse-module-test: ## the Synapse module before a fake Synapse of each version that it knows
	@if command -v python3 >/dev/null; then \
	  cd scripts/synapse && PYTHONDONTWRITEBYTECODE=1 python3 -m unittest -q test_fsbus_handover; \
	else \
	  echo 'python3 is not there: the tests of the Synapse module are skipped'; \
	fi

synapse-check: ## whether the module would take over in the Synapse at SYNAPSE=/path/to/synapse (read, not run)
	python3 scripts/synapse/check_versions.py $(SYNAPSE)

synapse-trial: ## the module in the real Synapse of LAB=/path (a built copy of the lab, stopped), before a stub of fsbus
	python3 scripts/synapse/trial.py $(LAB)

fuzz: ## each fuzz target for FUZZTIME
	@for p in $$(go list ./...); do \
	  for f in $$(go test -list '^Fuzz' $$p | grep '^Fuzz'); do \
	    echo "$$p $$f"; go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) $$p || exit 1; \
	  done; \
	done

bench: ## benchmarks of the packages, then fsbus against a naive proxy and direct calls
	go test -run '^$$' -bench . -benchmem ./...
	CGO_ENABLED=0 go run ./scripts/bench

hostile: ## attacks of all kinds on the built program: fails if others notice, or a budget is passed
	CGO_ENABLED=0 go run ./scripts/bench -run '^hostile$$'

# Binaries for the boards, stripped and reproducible: dist/fsbus-linux-ARCH.
cross:
	@mkdir -p dist
	GOOS=linux GOARCH=arm GOARM=6 $(BUILD) -o dist/fsbus-linux-armv6 .
	GOOS=linux GOARCH=arm GOARM=7 $(BUILD) -o dist/fsbus-linux-armv7 .
	GOOS=linux GOARCH=arm64 $(BUILD) -o dist/fsbus-linux-arm64 .
	GOOS=linux GOARCH=amd64 $(BUILD) -o dist/fsbus-linux-amd64 .
	@ls -l dist

qemu: cross ## the demo's core with the arm binaries, under qemu-user-static
	CGO_ENABLED=0 go run ./scripts/demo -quick -fsbus 'qemu-arm-static dist/fsbus-linux-armv7'
	CGO_ENABLED=0 go run ./scripts/demo -quick -fsbus 'qemu-aarch64-static dist/fsbus-linux-arm64'

crash: ## kill -9 the store's writer, and fsbus with its clients and servers, again and again
	FSBUS_STORE_CRASH_ROUNDS=1000 go test -run Kill9 -count=1 -timeout 60m ./store
	FSBUS_NODE_CRASH_ROUNDS=1000 go test -run KilledAgainAndAgain -count=1 -timeout 60m -v ./bus/node

sim: ## the simulated world, many seeds
	go test ./bus/sim -count=1 -timeout 120m -seeds 5000 -outboxseeds 5000

clean:
	rm -rf fsbus dist .demo
