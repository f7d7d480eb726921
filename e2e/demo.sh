#!/usr/bin/env bash
# make demo: culvert joins the laptop of a real cluster to its network, and leaves
# no trace. KEEP=1 leaves cluster and session up.
set -euo pipefail
cd "$(dirname "$0")/.."
export KUBECONFIG=$PWD/e2e/.run/kubeconfig CULVERT_IMAGE=localhost/culvert-shadow:dev HOME=${HOME:-/root}
log=$(mktemp)
laptop() { bin/cluster exec laptop -- "$@"; }
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { printf '\033[2mlaptop$\033[0m %s\n' "$*"; laptop "$@"; }
trace() {
	laptop sh -c 'ip -br addr; ip route; cat /etc/resolv.conf; ls /etc/resolv.conf*'
	laptop kubectl get all,cm,secret,sa,role,rolebinding,lease -n shop -o name | sort
}

[ "$(id -u)" = 0 ] || { echo "make demo: must be root, for the cluster's namespaces" >&2; exit 1; }
bin/cluster up
before=$(trace)

say "The laptop reaches the API server and nothing else of the cluster"
show curl -sS --max-time 3 http://web.shop || true

say "culvert connect -n shop"
setsid bin/cluster exec laptop -- "$PWD/bin/culvert" connect -n shop 2> >(tee "$log" >&2) &
session=$!
stop() { kill -INT "$session" 2>/dev/null && wait "$session" || true; }
trap 'stop; rm -f "$log"' EXIT
until grep -q '✓ connected' "$log"; do
	kill -0 "$session" 2>/dev/null || { echo "culvert ended before it was connected" >&2; exit 1; }
	sleep 0.1
done

say "Services by name"
show curl -sS http://web.shop
show redis-cli -h redis.shop set greeting hello
show redis-cli -h redis.shop get greeting
show psql -h pg.shop -U postgres -Atc "select 'postgres says ' || version()"
show ping -c 1 -W 2 db-0.db.shop

say "Names: on the laptop, and beside it what CoreDNS answers inside the cluster"
for name in web.shop.svc.cluster.local db.shop.svc.cluster.local web-alias.shop.svc.cluster.local nothing.shop.svc.cluster.local; do
	here=$(laptop dig +noall +comments +answer "$name" | sed -n 's/.*status: \([A-Z]*\).*/\1/p; /^[^;]/p' | awk '{print $1=="NOERROR"||$1=="NXDOMAIN" ? $1 : $4" "$5}' | sort -u | tr '\n' ' ')
	there=$(bin/cluster exec node1 -- dig @10.96.0.10 +noall +comments +answer "$name" | sed -n 's/.*status: \([A-Z]*\).*/\1/p; /^[^;]/p' | awk '{print $1=="NOERROR"||$1=="NXDOMAIN" ? $1 : $4" "$5}' | sort -u | tr '\n' ' ')
	printf '%-34s laptop:  %s\n%-34s CoreDNS: %s\n' "$name" "$here" "" "$there"
	[ "$here" = "$there" ] || { echo "they differ" >&2; exit 1; }
done

say "culvert status"
show "$PWD/bin/culvert" status

if [ "${KEEP:-}" = 1 ]; then
	trap - EXIT
	cat <<-TEXT

	The cluster and the session stay up. To look around, as root, in $PWD:
	  bin/cluster exec laptop -- bash       a shell on the laptop: curl http://web.shop
	  bin/cluster kubectl get pods -A       the cluster
	  kill -INT $session                        ends the session
	  make cluster-down                     ends the cluster
	TEXT
	exit
fi

say "Ctrl-C"
kill -INT "$session"
wait "$session"
trap 'rm -f "$log"' EXIT
after=$(trace)
if ! diff <(echo "$before") <(echo "$after"); then
	echo "something was left behind" >&2
	exit 1
fi
say "Addresses, routes, resolv.conf and every object of the namespace are as before"
bin/cluster down
