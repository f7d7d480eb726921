# culvert: build, test, and a real cluster to run against. See README.md.

VERSION    ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
NODES      ?= 1
GOFLAGS    += -trimpath
LDFLAGS    := -s -w -X main.version=$(VERSION)
STATICCHECK = go run honnef.co/go/tools/cmd/staticcheck@v0.8.2
CLUSTER    := bin/cluster

export NODES GOFLAGS

.PHONY: build cross images prepare cluster-up cluster-down demo bench test unit lint fuzz clean

build: bin/culvert

.PHONY: bin/culvert bin/cluster bin/bench
bin/culvert:
	CGO_ENABLED=0 go build -ldflags '$(LDFLAGS)' -o $@ ./cmd/culvert

bin/bench:
	CGO_ENABLED=0 go build -o $@ ./e2e/bench

bin/cluster:
	cd e2e/cluster && CGO_ENABLED=0 go build -o ../../$@ .

# What has only been compiled, with its tests: see README.md, Limits. What decides for
# another system does so on any: the tests of it that are compiled there are run here.
SYSTEMS  := linux/amd64 linux/arm64 darwin/amd64 darwin/arm64 windows/amd64 windows/arm64
DECIDING := ./pkg/resolver ./pkg/tun ./pkg/privileged ./pkg/sandbox

cross: $(SYSTEMS:%=cross/%)
	@for pkg in $(DECIDING); do \
		tests=$$(cd $$pkg && GOOS=windows go list -f '{{join .TestGoFiles "\n"}}' . | xargs sed -n 's/^func \(Test[A-Za-z0-9]*\)(.*/\1/p' | paste -sd'|'); \
		go test -run "^($$tests)$$" $$pkg || exit 1; \
	done

cross/%: export CGO_ENABLED = 0
cross/%:
	GOOS=$(*D) GOARCH=$(*F) go vet ./cmd/culvert ./pkg/...
	GOOS=$(*D) GOARCH=$(*F) go build -o /dev/null ./cmd/culvert

# OCI archives of the images for amd64 and arm64, in dist/; no Docker engine.
images:
	go run ./images -version '$(VERSION)'

# A real Kubernetes on this machine, in network namespaces; as root.
cluster-up: $(CLUSTER) images
	$(CLUSTER) up

# What the cluster and the tests need: Debian packages, Kubernetes, images, Consul.
prepare: $(CLUSTER)
	$(CLUSTER) build

cluster-down: $(CLUSTER)
	$(CLUSTER) down

demo: build $(CLUSTER) images
	e2e/demo.sh

# Ways from a laptop to a service side by side, as root: ssh -L, sshuttle,
# wireguard-go and culvert's data path in namespaces; kubectl port-forward, a bare
# upgraded stream and culvert on a cluster that is up; names a second, beside dnsmasq
# and CoreDNS; a session at rest among 10,000 Services; a host behind a hub, and a
# thousand; a release that goes to a host, beside scp, rsync and tar; then what an
# exchange costs on the cluster. Needs iperf3, openssh-server, sshuttle, nftables,
# dnsmasq-base and rsync of Debian.
# BENCH has flags: see bin/bench -h.
bench: build bin/bench $(CLUSTER) images
	@if $(CLUSTER) status >/dev/null 2>&1; then $(CLUSTER) load dist/culvert-shadow.tar; fi
	bin/bench -out docs/bench $(BENCH)
	@if $(CLUSTER) status >/dev/null 2>&1; then \
		set -x; go test -run='^$$' -bench=. -benchtime=1x -timeout=10m ./e2e; \
	else echo 'no cluster is up, so exchanges are not measured (make cluster-up)'; fi

# Everything: lint, unit tests, other systems, and end to end on a cluster of
# its own. As root; the last line counts the tests.
test:
	go run ./e2e/suite

lint:
	@test -z "$$(gofmt -l cmd pkg images manifests e2e)" || { gofmt -l cmd pkg images manifests e2e; exit 1; }
	go vet ./...
	$(STATICCHECK) ./...
	cd e2e/cluster && go vet . && $(STATICCHECK) .
	cd e2e/sample/kit && go vet . && $(STATICCHECK) .

unit:
	go run ./e2e/suite -unit

fuzz:
	e2e/fuzz.sh

clean:
	rm -rf bin dist
