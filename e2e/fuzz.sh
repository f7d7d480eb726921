#!/usr/bin/env bash
# make fuzz: every fuzz target of the repository, each for a while.
#
#   e2e/fuzz.sh [TIME]      20s each unless said otherwise; FUZZTIME=1m does the same
#
# What is found is kept by go in testdata/fuzz beside the target, to be committed
# with the cure; from then on it is an ordinary test.
set -uo pipefail
cd "$(dirname "$0")/.."
each=${1:-${FUZZTIME:-20s}}

targets=$(grep -roH --include='*_test.go' --exclude-dir=cluster '^func Fuzz[A-Za-z0-9_]*' . | sed 's|^\./\(.*\)/[^/]*:func |./\1 |' | sort)
[ -n "$targets" ] || { echo "fuzz: no target found" >&2; exit 1; }

good=0 bad=0
while read -r folder target; do
	printf '== %s %s, %s\n' "$folder" "$target" "$each"
	if go test -run='^$' -fuzz="^$target\$" -fuzztime="$each" "$folder" </dev/null; then
		good=$((good + 1))
	else
		bad=$((bad + 1))
	fi
done <<<"$targets"
echo "$good fuzz targets held, $bad failed"
[ "$bad" = 0 ]
