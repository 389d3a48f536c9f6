#!/usr/bin/env bash
# One process on each host that SSH reaches; the first is the coordinator. All hosts have this repository at the same
# path and the same Python on PATH. Ends with the worst exit code; a host that cannot be reached counts as 255.
#
#     scripts/ssh_launch.sh "host-a host-b" --mesh data=1,model=16 --prompts prompts.jsonl --out answers.jsonl
#
# Cloud TPU VMs need no list: gcloud compute tpus tpu-vm ssh NAME --worker=all --command="cd … && \
#   python -m razor_jax.launch --restarts 3 -- scripts/serve_multihost.py …"
set -euo pipefail
read -ra hosts <<<"${1:?usage: ssh_launch.sh \"host-a host-b\" arguments of serve_multihost.py}"
shift
remote=$(printf '%q ' "$@")
pids=()
for index in "${!hosts[@]}"; do
  # -tt: the remote launcher gets a hang-up, and ends its worker, when this script is interrupted.
  ssh -tt "${hosts[$index]}" "cd $(printf '%q' "$PWD") && python -m razor_jax.launch --restarts 3 \
    --coordinator ${hosts[0]}:8476 --processes ${#hosts[@]} --process-id $index -- \
    scripts/serve_multihost.py $remote" </dev/null &
  pids+=($!)
done
trap 'kill "${pids[@]}" 2>/dev/null' INT TERM
worst=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
