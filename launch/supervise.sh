#!/usr/bin/env bash
# Keep a run going until it has finished, whatever ends it on the way:
#
#   launch/supervise.sh accelerate launch --config_file launch/single.yaml train.py recipe=multipl_e resume=true
#
# The command must have resume=true. It is started again after a crash or a kill, after a pause that grows with every start that
# failed within a minute, and not any more after five of those in a row: then it is a mistake, not an accident. SIGTERM and SIGINT are
# passed on, and end both: the run saves first (below accelerate's launcher for several processes its step has 30 s for that).
set -uo pipefail

case " $* " in *" resume=true "*) ;; *) echo "error: resume=true: without it a second start refuses what the first one left; add it" >&2; exit 2 ;; esac

told="" child="" quick=0
pass_on() { told=1; [ -n "$child" ] && kill -TERM -- "-$child" 2>/dev/null; }
trap pass_on TERM INT
while [ -z "$told" ]; do
  began=$SECONDS
  setsid "$@" &  # a group of its own: a launcher that does not pass signals on is no obstacle then
  child=$!
  wait "$child"; status=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done  # a signal ends `wait` before it ends the run
  while [ -n "$told" ] && kill -0 -- "-$child" 2>/dev/null; do sleep 0.2; done  # its launcher is gone, and it still saves
  if [ "$status" = 0 ] || [ -n "$told" ]; then exit "$status"; fi
  if [ $((SECONDS - began)) -lt 60 ]; then quick=$((quick + 1)); else quick=0; fi
  if [ "$quick" -ge 5 ]; then
    echo "error: ended with status $status five times within a minute of its start: see what it said" >&2
    exit "$status"
  fi
  echo "supervise: ended with status $status; starting again" >&2
  sleep "$quick" &
  wait $!  # which a signal ends
done
exit 75
