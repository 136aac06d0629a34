#!/usr/bin/env bash
# One training run from nothing, as a person would do it by hand: stack, gateway, data, labels, pipeline.
#
#   ENGINES=20 SEED=7 SETTINGS="train.folds=3" bash .github/scripts/train.sh      simulated engines
#   DATA=path/to/train_FD001.txt.gz bash .github/scripts/train.sh                 recorded ones, in C-MAPSS format
#
# Leaves build/train/: result.json (what `fenceline train --json` printed), logs, and project/, a copy of the project that SETTINGS
# may change, with the state of the stack (MLflow's database too) in project/.fenceline. Uses free ports only.
# MLFLOW_TRACKING_URI sends the run to a team's server instead of the stack's own.
set -euo pipefail
cd "$(dirname "$0")/../.."

PATH="$PWD/.venv/bin:$PATH"
OUT="$PWD/build/train"
WAIT_S=300
TRACKING="${MLFLOW_TRACKING_URI:-}"
unset MLFLOW_TRACKING_URI

if [ -n "${DATA:-}" ] && [ ! -f "$DATA" ]; then
  echo "train.sh: no file $DATA in $PWD; leave DATA empty for simulated engines" >&2
  exit 2
fi
rm -rf "$OUT"
mkdir -p "$OUT/project/pipelines"
cp -r contracts feature_repo fenceline.toml "$OUT/project/"
cp pipelines/dvc.yaml pipelines/params.yaml "$OUT/project/pipelines/"
if [ -n "${DATA:-}" ]; then
  DATA="$(realpath "$DATA")"
else
  DATA="$OUT/engines.txt"
  python .github/scripts/simulated_engines.py "$DATA" --engines "${ENGINES:-20}" --seed "${SEED:-7}" >/dev/null
fi
cd "$OUT/project"

stack=
agent=
stop() {
  for pid in $agent $stack; do
    kill -TERM "$pid" 2>/dev/null || true
    wait "$pid" || true
  done
  agent=
  stack=
}
trap stop EXIT

# wait_for WHAT COMMAND…: until the command succeeds
wait_for() {
  local what="$1" deadline=$((SECONDS + WAIT_S))
  shift
  until "$@" 2>/dev/null; do
    if ((SECONDS > deadline)); then
      echo "train.sh: waited ${WAIT_S} s for $what; see the logs in build/train" >&2
      exit 1
    fi
    sleep 1
  done
}

rows_in_lake() {
  fenceline status --json | python -c 'import json, sys; print(sum(r["rows"] for r in json.load(sys.stdin)["ingest"].values()))'
}
stack_runs() { [ -s "$OUT/up.json" ]; }
all_in_lake() { [ "$(rows_in_lake)" -ge "$ROWS" ]; }

fenceline keys init >/dev/null
fenceline up --free-ports --json >"$OUT/up.json" 2>"$OUT/up.log" &
stack=$!
wait_for "the stack" stack_runs
fenceline device add runner-01 --home 50.03,8.56 --out "$OUT/agent.toml" >/dev/null
edge-agent run --config "$OUT/agent.toml" 2>"$OUT/agent.log" &
agent=$!
wait_for "the agent" edge-agent status --config "$OUT/agent.toml" >/dev/null

ROWS="$(fenceline replay "$DATA" --mapping cmapss --device runner-01 --json 2>"$OUT/replay.log" |
  python -c 'import json, sys; print(json.load(sys.stdin)["rows"])')"
wait_for "$ROWS rows in the lake" all_in_lake
fenceline labels add "$DATA" --mapping cmapss --run-to-failure
if [ -n "$TRACKING" ]; then
  stop # the pipeline then takes the server that the environment names
  export MLFLOW_TRACKING_URI="$TRACKING"
fi

sets=()
for setting in ${SETTINGS:-}; do
  sets+=(--set "$setting")
done
fenceline train --json "${sets[@]}" >"$OUT/result.json"
