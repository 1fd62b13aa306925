#!/usr/bin/env bash
# Installs the sandbox and the toolchains of these languages on Debian or Ubuntu (as root).
# Usage: eval/install_toolchains.sh [--if-possible] lua pl rb ...   (keys of eval/languages.yaml, or MultiPL-E's other words for
# them; without any: only the sandbox)
# --if-possible: on other systems, or without root, print what is missing instead of failing
set -euo pipefail
table="$(dirname "${BASH_SOURCE[0]}")/languages.yaml"
if_possible=false
if [ "${1:-}" = --if-possible ]; then
  if_possible=true
  shift
fi
key_of() { # WORD: the key of the language, as in flora_train/config/language_names.py
  case "$1" in
    adb) echo ada ;;
    clojure) echo clj ;;
    c++ | cxx) echo cpp ;;
    csharp | c#) echo cs ;;
    dlang) echo d ;;
    ex | exs) echo elixir ;;
    golang | go_test.go) echo go ;;
    haskell) echo hs ;;
    julia) echo jl ;;
    javascript) echo js ;;
    ocaml) echo ml ;;
    perl) echo pl ;;
    python | python3 | notypes.py | py_no_types) echo py ;;
    ruby) echo rb ;;
    racket | rkt-multiline) echo rkt ;;
    php-multiline) echo php ;;
    rust) echo rs ;;
    bash) echo sh ;;
    typescript) echo ts ;;
    *) echo "$1" ;;
  esac
}
keys=()
for word in "$@"; do keys+=("$(key_of "${word,,}")"); done
packages=(bubblewrap util-linux)
npm=()
listed() { # KEY FIELD: the items of a list in the entry of a language
  awk -v key="$1:" -v field="$2:" '$1 == key && /^[a-z]/ {on = 1; next} /^[a-z]/ {on = 0} on && $1 == field {print; exit}' "$table" |
    sed 's/.*\[\(.*\)\].*/\1/; s/,/ /g'
}
for key in "${keys[@]}"; do
  read -r -a words <<<"$(listed "$key" packages)"
  [ "${#words[@]}" -gt 0 ] || { echo "error: language '$key' is not in $table" >&2; exit 2; }
  packages+=("${words[@]}")
  read -r -a words <<<"$(listed "$key" npm)"
  npm+=("${words[@]}")
done
missing=()
for package in "${packages[@]}"; do
  [ "$package" = npm ] && command -v npm >/dev/null && continue # Node's own packages contain npm and conflict with Debian's
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
  if $if_possible && { [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; }; then
    echo "note: to run programs, first run: sudo eval/install_toolchains.sh ${keys[*]}   (missing: ${missing[*]})" >&2
    exit 0
  fi
  if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >&2; then
    $if_possible || exit 1
    echo "note: ${missing[*]} could not be installed; some programs will not be run" >&2
    exit 0
  fi
fi
[ "${#npm[@]}" -eq 0 ] || npm ls --global "${npm[@]}" >/dev/null 2>&1 || npm install --global "${npm[@]}"
