#!/usr/bin/env bash
# Runs an experiment on TPU slices of a GKE cluster, through xpk (pip install xpk).
#
#   CLUSTER=my-cluster ZONE=us-east5-a PROJECT=my-project TPU_TYPE=v5p-1024 BUCKET=gs://my-bucket/runs \
#     experiments/launch/gke.sh run bytes_lm --mesh -1 16 1
#
# xpk makes an image of the working tree on top of BASE_IMAGE, of Debian. Kubernetes starts all workers again after an
# error or preemption, and the run goes on from its newest checkpoint; by default xpk restarts after 42 and 127 to 255
# only, and 1 and 75 are what the run ends with (README.md). BUCKET is mounted with gcsfuse under /runs.
# DRY_RUN=1 prints the command only.
set -euo pipefail
: "${CLUSTER:?name of the cluster}" "${ZONE:?its zone}" "${PROJECT:?the project}" "${TPU_TYPE:?such as v5p-1024}"
: "${BUCKET:?gs:// folder for the runs}"
if [ $# -lt 2 ] || [ "$1" != run ]; then
    echo "usage: CLUSTER=... ZONE=... PROJECT=... TPU_TYPE=... BUCKET=gs://... $0 run NAME [--field value ...]" >&2
    exit 2
fi
[ -z "${DRY_RUN:-}" ] || xpk() { printf 'xpk'; printf ' %q' "$@"; echo; }
root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
bucket=${BUCKET#gs://}
name=${bucket%%/*}
folder=${bucket#"$name"}
folder=${folder#/}
# --resume starts a run that has no checkpoint yet, too, so that first and later attempts are the same command.
words=$(printf '%q ' "$@" --output "/runs/${RUN:-$2}" --coordinator auto --resume)
packages=https://packages.cloud.google.com/apt
key=/usr/share/keyrings/cloud.google.asc
command="python -c 'import sys, urllib.request as u; u.urlretrieve(*sys.argv[1:])' $packages/doc/apt-key.gpg $key \
  && echo deb [signed-by=$key] $packages gcsfuse-\$(. /etc/os-release; echo \$VERSION_CODENAME) main \
  > /etc/apt/sources.list.d/gcsfuse.list \
  && apt-get -qq update && apt-get -qq install -y gcsfuse && mkdir -p /runs \
  && gcsfuse --implicit-dirs ${folder:+--only-dir $folder} $name /runs \
  && pip install -q -e '.[experiments,tpu]' \
  && exec python -m experiments $words"
xpk workload create \
    --cluster "$CLUSTER" --zone "$ZONE" --project "$PROJECT" \
    --workload "${WORKLOAD:-sparsejax-${2//_/-}}" --tpu-type "$TPU_TYPE" --num-slices "${SLICES:-1}" \
    --base-docker-image "${BASE_IMAGE:-python:3.12-bookworm}" --script-dir "$root" \
    --max-restarts "${RESTARTS:-100}" --restart-on-exit-codes 1,75 --command "$command"
