#!/usr/bin/env bash
# Restarts a run until it has finished:
#
#   launch/supervise.sh accelerate launch --config_file launch/single.yaml train.py recipe=multipl_e resume=true
#
# The command must contain resume=true. It is started again after a crash or a kill, with a pause that grows with every start that
# failed within a minute. After five of those in a row it gives up, because the cause is then in the command. SIGTERM and SIGINT are
# passed on and end both; the run saves first (accelerate's launcher for several processes allows its step 30 s).
set -uo pipefail

case " $* " in *" resume=true "*) ;; *) echo "error: resume=true is missing: without it, a second start refuses the files of the first; add it" >&2; exit 2 ;; esac

told="" child="" quick=0
pass_on() { told=1; [ -n "$child" ] && kill -TERM -- "-$child" 2>/dev/null; }
trap pass_on TERM INT
while [ -z "$told" ]; do
  began=$SECONDS
  setsid "$@" &  # its own process group, so that signals reach the run even if the launcher does not pass them on
  child=$!
  wait "$child"; status=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done  # a signal interrupts `wait` before the run ends
  while [ -n "$told" ] && kill -0 -- "-$child" 2>/dev/null; do sleep 0.2; done  # the launcher has ended while the run still saves
  if [ "$status" = 0 ] || [ -n "$told" ]; then exit "$status"; fi
  if [ $((SECONDS - began)) -lt 60 ]; then quick=$((quick + 1)); else quick=0; fi
  if [ "$quick" -ge 5 ]; then
    echo "error: ended with status $status five times within a minute of its start: see its output" >&2
    exit "$status"
  fi
  echo "supervise: ended with status $status; starting again" >&2
  sleep "$quick" &
  wait $!  # a signal interrupts it
done
exit 75
