#!/usr/bin/env bash
# Trains an experiment under torchrun, on one node or on several.
#
# Copy this file, fill in the block below, and run the copy on every node, for example
#     ./torchrun.sh                           # on the only node
#     NODE_RANK=1 ./torchrun.sh               # on the second of two
#     ./torchrun.sh training.train_iters=20   # with keys of the experiment for this time
# Exit codes: 0 done, 2 the input is wrong, 75 stopped by a signal and saved (run it again), 1 anything else.
set -euo pipefail

# ---- fill in; a variable of that name in the environment wins ----------------------------------------
CONFIG="${CONFIG:-}"                  # the experiment, for example configs/quickstart.yaml
RANKS_PER_NODE="${RANKS_PER_NODE:-}"  # processes on each node; empty: one for each GPU
NODES="${NODES:-1}"                   # nodes that take part
NODE_RANK="${NODE_RANK:-0}"           # which of them this is, from 0
MASTER_ADDR="${MASTER_ADDR:-}"        # with several nodes: name or address of node 0
MASTER_PORT="${MASTER_PORT:-29500}"   # with several nodes: a free port there, the same on all nodes
VENV="${VENV:-}"                      # virtual environment with megatron-moe; empty: the python on PATH
SAVE_SECONDS="${SAVE_SECONDS:-600}"   # how long ranks may take to save when they are told to stop
# ---- below nothing needs to be changed ---------------------------------------------------------------

fail() {
    echo "${0##*/}: $1" >&2
    exit 2
}

whole_number() { # NAME SMALLEST LARGEST
    [[ ${!1} =~ ^(0|[1-9][0-9]{0,8})$ && ${!1} -ge $2 && ${!1} -le $3 ]] ||
        fail "$1 must be a whole number from $2 to $3, not '${!1}'"
}

[[ -n $CONFIG ]] || fail "CONFIG is not filled in: name the experiment's YAML file at the top of this file"
[[ -f $CONFIG ]] || fail "CONFIG: there is no file $CONFIG"
if [[ -z $RANKS_PER_NODE ]]; then
    command -v nvidia-smi > /dev/null || fail "RANKS_PER_NODE is not filled in, and there are no GPUs to count"
    gpus=$(nvidia-smi --list-gpus) || fail "RANKS_PER_NODE is not filled in, and nvidia-smi says: $gpus"
    RANKS_PER_NODE=$(grep -c . <<< "$gpus") || fail "RANKS_PER_NODE is not filled in, and nvidia-smi lists no GPUs"
fi
whole_number RANKS_PER_NODE 1 1000
whole_number NODES 1 100000
whole_number NODE_RANK 0 100000
whole_number MASTER_PORT 1 65535
whole_number SAVE_SECONDS 0 1000000
((NODE_RANK < NODES)) || fail "NODE_RANK is $NODE_RANK, but the nodes are numbered from 0 to $((NODES - 1))"

python=python
if [[ -n $VENV ]]; then
    python=$VENV/bin/python
    [[ -x $python ]] || fail "VENV: there is no $python"
fi

meeting=(--standalone)
if ((NODES > 1)); then
    [[ -n $MASTER_ADDR ]] || fail "MASTER_ADDR is not filled in: name node 0, where the $NODES nodes meet"
    meeting=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi

# Mistakes are said here, once, and not by every rank. This is also where the run folder is known from.
checked=$("$python" -m megatron_moe validate "$CONFIG" "$@")
run_folder=$(sed -n 's/^# Run folder: //p' <<< "$checked")
started=$(date +%s)

threads=$(($(nproc) / RANKS_PER_NODE))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
# torchrun kills ranks that have not ended so long after it passed on a signal.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SAVE_SECONDS

"$python" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$RANKS_PER_NODE" "${meeting[@]}" \
    -m megatron_moe train "$CONFIG" "$@" &
launcher=$!

# On a signal the ranks finish their step and save. It ends `wait` too, which is called again.
trap 'signalled=1; kill -TERM "$launcher" 2> /dev/null || true' TERM INT HUP USR1
code=127
signalled=1
while [[ -n $signalled ]]; do
    signalled=""
    status=0
    wait "$launcher" || status=$?
    ((status == 127)) || code=$status # 127: it was waited for already
done
# torchrun makes 1 of every exit code of a rank; that a run was stopped and saved says this file.
if [[ $code -ne 0 && $(stat -c %Y "$run_folder/requeue" 2> /dev/null || echo 0) -ge $started ]]; then
    code=75
fi
exit "$code"
