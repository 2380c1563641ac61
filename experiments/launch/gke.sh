#!/usr/bin/env bash
# Runs an experiment on TPU slices of a GKE cluster, through xpk (pip install xpk).
#
#   CLUSTER=my-cluster ZONE=us-east5-a PROJECT=my-project TPU_TYPE=v5p-1024 BUCKET=gs://my-bucket/runs \
#     experiments/launch/gke.sh run bytes_lm --mesh -1 16 1
#
# xpk makes an image of the working tree on top of BASE_IMAGE. Kubernetes starts all workers again after a failure or
# preemption, and the run goes on from its newest checkpoint. BUCKET is mounted with gcsfuse under /runs.
set -euo pipefail
: "${CLUSTER:?name of the cluster}" "${ZONE:?its zone}" "${PROJECT:?the project}" "${TPU_TYPE:?such as v5p-1024}"
: "${BUCKET:?gs:// folder for the runs}"
[ $# -ge 2 ] || { echo "usage: CLUSTER=... ZONE=... PROJECT=... TPU_TYPE=... BUCKET=... $0 run NAME ..." >&2; exit 2; }
root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
bucket=${BUCKET#gs://}
name=${bucket%%/*}
folder=${bucket#"$name"}
folder=${folder#/}
words=$(printf '%q ' "$@")
# --resume starts a run that has no checkpoint yet, too, so that first and later attempts are the same command.
command="apt-get -qq update && apt-get -qq install -y gcsfuse && mkdir -p /runs \
  && gcsfuse --implicit-dirs ${folder:+--only-dir $folder} $name /runs \
  && pip install -q -e '.[experiments,tpu]' \
  && exec python -m experiments $words --output /runs/${RUN:-$2} --coordinator auto --resume"
exec xpk workload create \
    --cluster "$CLUSTER" --zone "$ZONE" --project "$PROJECT" \
    --workload "${WORKLOAD:-sparsejax-$2}" --tpu-type "$TPU_TYPE" --num-slices "${SLICES:-1}" \
    --base-docker-image "${BASE_IMAGE:-python:3.12}" --script-dir "$root" \
    --max-restarts "${RESTARTS:-100}" --command "$command"
