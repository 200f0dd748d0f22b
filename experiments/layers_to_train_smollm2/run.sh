#!/bin/sh
# Runs the experiment on the embedded model. If it is stopped, the same command carries on; finished jobs are not run
# twice. Further arguments are settings for every job.
exec python "$(dirname "$0")/run.py" "$@"
