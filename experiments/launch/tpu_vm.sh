#!/usr/bin/env bash
# Runs an experiment on all workers of a Cloud TPU VM slice, one process on each; starts again after preemption.
#
#   TPU=my-slice ZONE=us-east5-a BUCKET=gs://my-bucket/runs experiments/launch/tpu_vm.sh run bytes_lm --mesh -1 16 1
#
# The last commit is copied to the workers; runs go to a folder of BUCKET that is mounted on all of them with gcsfuse,
# which must be installed there, since all processes must see the same folder. DRY_RUN=1 prints the commands only.
set -euo pipefail
: "${TPU:?name of the TPU VM}" "${ZONE:?its zone}" "${BUCKET:?gs:// folder for the runs}"
if [ $# -lt 2 ] || [ "$1" != run ]; then
    echo "usage: TPU=... ZONE=... BUCKET=gs://... $0 run NAME [--field value ...]" >&2
    exit 2
fi
[ -z "${DRY_RUN:-}" ] || gcloud() { printf 'gcloud'; printf ' %q' "$@"; echo; }
root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
bucket=${BUCKET#gs://}
name=${bucket%%/*}
folder=${bucket#"$name"}
folder=${folder#/}
on_all() { gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"; }

archive=$(mktemp --suffix .tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$root" archive --format tar.gz -o "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU:sparsejax.tar.gz" --zone "$ZONE" --worker=all
on_all "rm -rf sparsejax && mkdir -p sparsejax runs && tar -xzf sparsejax.tar.gz -C sparsejax \
  && { mountpoint -q runs || gcsfuse --implicit-dirs ${folder:+--only-dir $folder} $name runs; } \
  && { [ -x venv/bin/python ] || python3 -m venv venv; } && venv/bin/pip install -q -e 'sparsejax[experiments,tpu]'"

words=$(printf '%q ' "$@" --output "../runs/${RUN:-$2}" --coordinator auto)
for attempt in $(seq 1 "${ATTEMPTS:-100}"); do
    again=$([ "$attempt" -gt 1 ] && echo --resume || true)
    status=0
    on_all "cd sparsejax && exec ../venv/bin/python -m experiments $words$again" || status=$?
    case $status in
        0) exit 0 ;;
        2) exit 2 ;; # refused: starting again would not help
    esac
    echo "attempt $attempt ended with status $status; all workers start again from the newest checkpoint" >&2
    sleep 30
done
exit "$status"
