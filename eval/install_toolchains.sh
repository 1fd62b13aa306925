#!/usr/bin/env bash
# Install what programs of these languages need, and the sandbox, on Debian or Ubuntu (as root).
# Usage: eval/install_toolchains.sh lua pl rb ...      (keys of eval/languages.yaml; without words: only the sandbox)
set -euo pipefail
table="$(dirname "${BASH_SOURCE[0]}")/languages.yaml"
packages=(bubblewrap util-linux)
for key in "$@"; do
  line=$(awk -v key="$key:" '$1 == key && /^[a-z]/ {on = 1; next} /^[a-z]/ {on = 0} on && $1 == "packages:" {print; exit}' "$table")
  [ -n "$line" ] || { echo "error: language '$key' is not in $table" >&2; exit 2; }
  read -r -a words <<<"$(sed 's/.*\[\(.*\)\].*/\1/; s/,/ /g' <<<"$line")"
  packages+=("${words[@]}")
done
apt-get update -qq
apt-get install -y --no-install-recommends "${packages[@]}"
